"""Training a model further on images, as its users do: whole weights, or a LoRA on them."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.changes import LowRank
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.ops.in_place import InPlace
from expunge.ops.training_target import compute_training_target
from expunge.runtime.context import RunContext


def train_on_images(
    model: Model,
    trained: InPlace,
    captions: list[str],
    latents: Tensor,
    run: RunContext,
    *,
    max_train_steps: int,
    batch_size: int,
    learning_rate: float,
    rank: int = 0,
    label: str = "finetuning",
) -> tuple[LowRank, ...]:
    """Train parameters in place with the loss that a diffusion model is made with.

        min E ‖prediction(z_t, t, c) − target(x, ε)‖²,     z_t = √ᾱ_t x + √(1 − ᾱ_t) ε

    With a rank, W + B A is trained in the place of W, A from small random entries and B from 0: dL/dB =
    dL/dW Aᵀ and dL/dA = Bᵀ dL/dW.

    Args:
        model: as it stands, with an edit or without.
        trained: its parameters; matrices alone for a rank.
        captions: n.
        latents: (n, c, h, w), an image of each.
        run: its seed draws batches, times and noise.
        max_train_steps: how many steps.
        batch_size: rows a step.
        learning_rate: AdamW's.
        rank: of a LoRA; 0 trains whole weights.
        label: for the seeds and the progress.

    Returns:
        The LoRA's changes; none for whole weights, which are in the parameters alone.

    Source: LoRA (Hu et al., ICLR 2022, arXiv 2106.09685).
    """
    generator, levels = run.generator(label), model.log_snr()
    with torch.no_grad():
        # The text encoder is not trained, so that captions are encoded once.
        text = model.encode(captions)
    before = [value.clone() for value in trained.values]
    shapes = [parameter.shape for parameter in trained.parameters.values()]
    downs = [torch.randn((rank, shape[1:].numel()), generator=generator) * shape[1:].numel() ** -0.5
             for shape in shapes if rank]  # fmt: skip
    downs = [down.to(before[0]) for down in downs]
    ups = [torch.zeros((shape[0], rank)).to(before[0]) for shape in shapes if rank]
    values = [*ups, *downs] if rank else trained.values
    # Without `foreach`: its fused sums would hold copies of all parameters at once.
    # LoRA's trainers decay nothing; whole weights would drift with AdamW's default.
    optimiser = torch.optim.AdamW(
        values, lr=learning_rate, foreach=False, weight_decay=0.01 * (not rank)
    )
    with frozen(model.parameters()):
        # Frozen but for what is trained: activations of the rest need not be kept.
        for parameter in trained.parameters.values():
            parameter.requires_grad_()
        for step in range(max_train_steps):
            run.progress(label, step, max_train_steps)
            rows = torch.randint(len(captions), (batch_size,), generator=generator)
            t = torch.randint(len(levels), (batch_size,), generator=generator)
            noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator)
            x, noise = latents[rows.to(latents.device)], noise.to(latents)
            # Bounded, for a timestep of noise alone has an infinite log SNR.
            target = compute_training_target(model.prediction_type, x, noise, levels[t].clamp(-20, 20))
            with torch.enable_grad():
                z = model.add_noise(x, noise, t.to(x.device))
                predicted = model.predict(z, t.to(x.device), text[rows.tolist()])
                loss = (predicted.float() - target.float()).square().mean()
                gradients = trained.gradients(loss)
            if rank:
                whole = [g.reshape(s[0], -1) for g, s in zip(gradients, shapes, strict=True)]
                gradients = [g @ down.T for g, down in zip(whole, downs, strict=True)]
                gradients += [up.T @ g for g, up in zip(whole, ups, strict=True)]
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = gradient
            optimiser.step()
            for value, own, up, down in zip(trained.values, before, ups, downs, strict=False):
                value.copy_(own + (up @ down).flatten())
            # The optimiser works on float32 copies; the model reads its own half-precision weights.
            trained.write()
    run.progress(label, max_train_steps, max_train_steps)
    layers = [name.rpartition(".")[0] for name in trained.parameters]
    return tuple(
        LowRank((layer,), up.detach().cpu(), down.detach().cpu())
        for layer, up, down in zip(layers, ups, downs, strict=False)
    )
