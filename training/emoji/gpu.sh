#!/usr/bin/env bash
# Trains the full world on a GPU machine that runs commands of ten minutes, has no network, and may start bare each time.
#
#   bash training/emoji/gpu.sh prepare           at home, once: build/emoji gets the drawings, the tokenizer, two wheels
#   bash training/emoji/gpu.sh train             there, with build/emoji: until it says "finished"; results in $OUT
#   bash training/emoji/gpu.sh receive FOLDER    at home: what came back into the work folder, and into build/emoji
#
# `train` goes on where it stopped: from its own work folder while the machine lasts, else from what was received.
set -euo pipefail
cd "$(dirname "$0")/../.."

WORLD=training/emoji/full.toml
CARRIED=build/emoji               # travels with the working tree: start.*, made.*, wheels
HOME_WORK=${HOME_WORK:-training/emoji/made/full}
WORK=${WORK:-build/emoji-work}    # on the GPU machine; kept between commands
SITE=build/site
LIMIT=${LIMIT:-585}               # seconds this command may take
VAE=${VAE:-3.5} CLIP=${CLIP:-4} DETECTOR=${DETECTOR:-5} UNET=${UNET:-14}   # minutes
PRESET=${PRESET:-gpu} COMPILE=${COMPILE---compile}
MORE_UNET=${MORE_UNET:-} MORE=${MORE:-} TESTS=${TESTS:-2000} PICTURES=${PICTURES:-20}  # for trials at toy scale
PYTHON=${PYTHON:-python3}

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
stage() { local name=$1; shift; "$PYTHON" -m "training.emoji.$name" "$@"; }
left() { echo $((LIMIT - SECONDS)); }
trained() { stage carry minutes --work "$WORK"; }
less() { "$PYTHON" -c "import sys; sys.exit(not $1 < $2)"; }

prepare() {
    stage tokenizer --world "$WORLD" --work "$HOME_WORK"
    rm -f "$CARRIED"/made.*
    stage carry pack start --work "$HOME_WORK" --folder "$CARRIED"
    local versions
    versions=$(grep -E '^(diffusers|importlib-metadata)==' constraints.txt)
    # shellcheck disable=SC2086  # one word a package
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$CARRIED/wheels" $versions
    du -sh "$CARRIED"
}

set_up() {
    if [ ! -d "$SITE" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" "$CARRIED"/wheels/*.whl
        # The package itself runs from the working tree; only its version is asked for.
        local version
        version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
        mkdir -p "$SITE/expunge-$version.dist-info"
        printf 'Metadata-Version: 2.1\nName: expunge\nVersion: %s\n' "$version" > "$SITE/expunge-$version.dist-info/METADATA"
    fi
    export PYTHONPATH="$PWD/src:$PWD:$PWD/$SITE" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TERM=dumb
    export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-3}
    [ -f "$WORK/drawings.safetensors" ] || stage carry unpack start --work "$WORK" --folder "$CARRIED"
    if [ ! -d "$WORK/vae" ] && [ -f "$CARRIED/made.00" ]; then
        stage carry unpack made --work "$WORK" --folder "$CARRIED"
    fi
}

background() {  # NAME ARGUMENTS...: a stage whose output goes to a file
    local name=$1
    shift
    # shellcheck disable=SC2086
    stage "$name" --world "$WORLD" --work "$WORK" "$@" $MORE > "$WORK/$name.out" 2>&1 &
}

train() {
    local vae=0 clip=0 detector=0 session
    set_up
    say "set up; the denoiser has had $(trained) of $UNET minutes"
    if [ ! -d "$WORK/vae" ]; then
        background vae --preset "$PRESET" --minutes "$VAE"
        vae=$!
    fi
    if [ ! -d "$WORK/text_encoder" ]; then
        background clip --preset "$PRESET" --minutes "$CLIP"
        clip=$!
    fi
    [ $vae = 0 ] || wait $vae || { tail -n 30 "$WORK/vae.out"; exit 1; }
    if [ ! -f "$WORK/detector/held_out.json" ]; then
        OMP_NUM_THREADS=8 background detector --out "$WORK/detector" --minutes "$DETECTOR" --whole 2 --tests "$TESTS"
        detector=$!
    fi
    [ $clip = 0 ] || wait $clip || { tail -n 30 "$WORK/clip.out"; exit 1; }
    tail -qn 1 "$WORK"/{vae,clip}.log || true
    stage carry pack made --work "$WORK" --folder "$OUT"   # should the denoiser fail, the rest is safe

    session=$(("$(left)" - 45))
    if less "$(trained)" "$UNET" && [ $session -gt 30 ]; then
        say "the denoiser, for up to $session s"
        # shellcheck disable=SC2086
        stage unet --world "$WORLD" --work "$WORK" --preset "$PRESET" --minutes "$UNET" $COMPILE $MORE_UNET \
            --session "$("$PYTHON" -c "print($session / 60)")" > "$WORK/unet.out" 2>&1 || { tail -n 30 "$WORK/unet.out"; exit 1; }
        tail -n 2 "$WORK/unet.log"
    fi
    if [ $detector != 0 ]; then
        while kill -0 $detector 2> /dev/null && [ "$(left)" -gt 30 ]; do sleep 1; done
        kill $detector 2> /dev/null && say "the detector goes on next time"
        tail -n 1 "$WORK/detector.log"
    fi
    if ! less "$(trained)" "$UNET" && [ -f "$WORK/detector/held_out.json" ] && [ "$(left)" -gt 120 ]; then
        say "the gates"
        stage export --work "$WORK" --to "$WORK/pipeline"
        timeout "$(($(left) - 20))" "$PYTHON" -m training.emoji.gates --world "$WORLD" --pipeline "$WORK/pipeline" \
            --detector "$WORK/detector" --batch 256 --pictures "$PICTURES" --to "$WORK/gates.json" || true
        [ ! -f "$WORK/gates.json" ] || say "finished"
    fi
    stage carry pack made --work "$WORK" --folder "$OUT"
    say "the denoiser has had $(trained) of $UNET minutes"
}

receive() {
    mkdir -p "$CARRIED"
    rm -f "$CARRIED"/made.*
    cp "$1"/made.* "$CARRIED"
    stage carry unpack made --work "$HOME_WORK" --folder "$CARRIED"
    say "the denoiser has had $(stage carry minutes --work "$HOME_WORK") minutes"
}

"$@"
