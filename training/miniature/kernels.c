/* Group normalization with SiLU behind it, and GEGLU, forward and backward: bfloat16 in and out, float32 between.

   PyTorch's own take 30 % of a VAE's training step on a CPU, since each is several passes over memory; these read
   what they need once. Images are channels last: x[sample][pixel][channel]. One thread; `fast.py` builds and calls it. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 narrow(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* mean, rstd: (n, groups), for the backward pass. */
void group_norm_forward(const bf16 *restrict x, const float *restrict w, const float *restrict b, bf16 *restrict y,
                        float *restrict mean, float *restrict rstd, long n, long pixels, long channels, long groups,
                        float eps, long silu) {
    long width = channels / groups;
    float *sum = malloc(4 * channels * sizeof(float)), *square = sum + channels;
    float *scale = square + channels, *shift = scale + channels;
    for (long i = 0; i < n; i++) {
        const bf16 *in = x + i * pixels * channels;
        bf16 *out = y + i * pixels * channels;
        memset(sum, 0, 2 * channels * sizeof(float));
        for (long p = 0; p < pixels; p++) /* around the first pixel, so that a large mean costs no precision */
            for (long c = 0; c < channels; c++) {
                float v = widen(in[p * channels + c]) - widen(in[c]);
                sum[c] += v;
                square[c] += v * v;
            }
        for (long g = 0; g < groups; g++) {
            double m = 0, s = 0;
            for (long c = g * width; c < (g + 1) * width; c++) m += sum[c] / pixels + widen(in[c]);
            m /= width;
            for (long c = g * width; c < (g + 1) * width; c++) {
                double here = sum[c] / pixels, off = here + widen(in[c]) - m;
                s += square[c] / pixels - here * here + off * off;
            }
            float r = 1.0 / sqrt(s / width + eps);
            mean[i * groups + g] = m;
            rstd[i * groups + g] = r;
            for (long c = g * width; c < (g + 1) * width; c++) {
                scale[c] = r * w[c];
                shift[c] = b[c] - (float)m * r * w[c];
            }
        }
        for (long p = 0; p < pixels; p++)
            if (silu)
                for (long c = 0; c < channels; c++) {
                    float z = widen(in[p * channels + c]) * scale[c] + shift[c];
                    out[p * channels + c] = narrow(z * sigmoid(z));
                }
            else
                for (long c = 0; c < channels; c++)
                    out[p * channels + c] = narrow(widen(in[p * channels + c]) * scale[c] + shift[c]);
    }
    free(sum);
}

/* dw, db: (channels), added to. */
void group_norm_backward(const bf16 *restrict dy, const bf16 *restrict x, const float *restrict w,
                         const float *restrict b, const float *restrict mean, const float *restrict rstd,
                         bf16 *restrict dx, float *restrict dw, float *restrict db, long n, long pixels, long channels,
                         long groups, long silu) {
    long width = channels / groups;
    float *dz = malloc((pixels * channels + 6 * channels) * sizeof(float));
    float *one = dz + pixels * channels, *two = one + channels, *r = two + channels, *m = r + channels;
    float *of_x = m + channels, *of_one = of_x + channels;
    for (long i = 0; i < n; i++) {
        const bf16 *in = x + i * pixels * channels, *grad = dy + i * pixels * channels;
        bf16 *out = dx + i * pixels * channels;
        memset(one, 0, 2 * channels * sizeof(float));
        for (long c = 0; c < channels; c++) {
            r[c] = rstd[i * groups + c / width];
            m[c] = mean[i * groups + c / width];
        }
        for (long p = 0; p < pixels; p++)
            if (silu)
                for (long c = 0; c < channels; c++) {
                    float normed = (widen(in[p * channels + c]) - m[c]) * r[c];
                    float z = normed * w[c] + b[c], s = sigmoid(z);
                    float d = widen(grad[p * channels + c]) * s * (1.0f + z * (1.0f - s));
                    dz[p * channels + c] = d;
                    one[c] += d;
                    two[c] += d * normed;
                }
            else
                for (long c = 0; c < channels; c++) {
                    float normed = (widen(in[p * channels + c]) - m[c]) * r[c];
                    float d = widen(grad[p * channels + c]);
                    dz[p * channels + c] = d;
                    one[c] += d;
                    two[c] += d * normed;
                }
        for (long g = 0; g < groups; g++) {
            float a = 0, e = 0;
            for (long c = g * width; c < (g + 1) * width; c++) {
                a += w[c] * one[c];
                e += w[c] * two[c];
                db[c] += one[c];
                dw[c] += two[c];
            }
            a /= pixels * width;
            e /= pixels * width;
            for (long c = g * width; c < (g + 1) * width; c++) { /* dx = r (w dz - a - normed e) */
                of_x[c] = -r[c] * r[c] * e;
                of_one[c] = -r[c] * a + r[c] * r[c] * e * m[c];
            }
        }
        for (long p = 0; p < pixels; p++)
            for (long c = 0; c < channels; c++)
                out[p * channels + c] =
                    narrow(r[c] * w[c] * dz[p * channels + c] + of_x[c] * widen(in[p * channels + c]) + of_one[c]);
    }
    free(dz);
}

#define ROOT_HALF 0.70710678118654752f
#define DENSITY 0.39894228040143268f

/* x: (rows, 2 * width), the values before the gates; y = values * gelu(gates): (rows, width). */
void geglu_forward(const bf16 *restrict x, bf16 *restrict y, long rows, long width) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < width; c++) {
            float v = widen(x[i * 2 * width + c]), g = widen(x[i * 2 * width + width + c]);
            y[i * width + c] = narrow(v * 0.5f * g * (1.0f + erff(g * ROOT_HALF)));
        }
}

void geglu_backward(const bf16 *restrict dy, const bf16 *restrict x, bf16 *restrict dx, long rows, long width) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < width; c++) {
            float v = widen(x[i * 2 * width + c]), g = widen(x[i * 2 * width + width + c]);
            float below = 0.5f * (1.0f + erff(g * ROOT_HALF)), d = widen(dy[i * width + c]);
            dx[i * 2 * width + c] = narrow(d * g * below);
            dx[i * 2 * width + width + c] = narrow(d * v * (below + g * DENSITY * expf(-0.5f * g * g)));
        }
}
