"""Closed forms at true size: an edit for 100 concepts, and the erased model, without loading the model.

A diffusers folder with random half-precision weights of the true shapes is written first (from the
model's own configuration, built without memory). Then, in a process of its own: the closed form (token
embeddings given, as the text encoders' memory does not count), and the export, which streams every
changed tensor from the old safetensors file to the new one. Peak memory is the whole process's, its
imports among it; on a busy machine, the processor's seconds say more than the clock's. FLUX.1,
FLUX.2-klein and Z-Image have the entries of text at their true size and few of the blocks behind them,
which are only copied. FLUX.1 and FLUX.2-klein pad each text to 512 tokens: UCE moves the last of a
concept's own there, and with FLUX.1 keeps 50 general words, not 500; with FLUX.2-klein it keeps the last
token of 500. `flux2-klein-40` has 40 tokens a text, all of them moved and kept, and ten of MACE's thirty
templates. A token's embedding is random, and the same wherever its text encoder reads the same: up
to the token, or, with T5, in the whole prompt.
Writes `benchmarks/results/true_size.json`, a row for each model and method.

    python benchmarks/true_size.py sd14 --method uce [--concepts 100] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch

from expunge.base import registry
from expunge.base.files import replacing
from expunge.changes import WeightChange
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.edit import Edit, Record
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.fingerprint import hash_base, list_places
from expunge.model import Model
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext
from expunge.text import Text

SD14 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
}  # fmt: skip
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FLUX = {
    "num_layers": 2, "num_single_layers": 4, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip

KLEIN = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
Z_IMAGE = {"n_layers": 2, "n_refiner_layers": 2}

MODELS: dict[str, dict[str, Any]] = {
    "sd14": {"family": "stable_diffusion", "class": "UNet2DConditionModel", "config": SD14,
             "tokens": 77, "width": 768, "pooled": 0, "uce": {}},
    "sdxl": {"family": "sdxl", "class": "UNet2DConditionModel", "config": SDXL,
             "tokens": 77, "width": 2048, "pooled": 1280, "uce": {}},
    "flux": {"family": "flux", "class": "FluxTransformer2DModel", "config": FLUX,
             "tokens": 512, "width": 4096, "pooled": 768,
             "uce": {"num_retain_words": 50, "positions": "last"}},
    "flux2-klein": {"family": "flux2", "class": "Flux2Transformer2DModel", "config": KLEIN,
                    "tokens": 512, "width": 7680, "pooled": 0,
                    "uce": {"positions": "last", "retain_positions": "last"}},
    # The same text encoder, asked for 40 tokens a prompt: enough for the templates of erasures.
    "flux2-klein-40": {"family": "flux2", "class": "Flux2Transformer2DModel", "config": KLEIN,
                       "tokens": 40, "width": 7680, "pooled": 0, "uce": {},
                       "mace": {"templates": TEMPLATES["object"][::3]}},
    # As many tokens as a prompt of ten words has in its chat template; the padding is never read.
    "z-image": {"family": "z_image", "class": "ZImageTransformer2DModel", "config": Z_IMAGE,
                "tokens": 24, "width": 2560, "pooled": 0, "uce": {}},
}  # fmt: skip


PARTS = ("closed form", "hash of the base", "export")


def network(model: str) -> Any:
    """The denoiser, its tensors without memory."""
    import diffusers
    from accelerate import init_empty_weights

    spec = MODELS[model]
    with init_empty_weights():
        return getattr(diffusers, spec["class"])(**spec["config"])


def write(model: str, folder: Path) -> int:
    """A folder with the denoiser's configuration and random weights in half precision; its bytes."""
    spec = MODELS[model]
    family = registry.get("families", spec["family"])
    net = network(model)
    place = folder / family.denoiser
    place.mkdir(parents=True)
    index = {"_class_name": family.pipelines[0], family.denoiser: ["diffusers", spec["class"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (place / "config.json").write_text(json.dumps({"_class_name": spec["class"], **spec["config"]}))
    header, at = {}, 0
    for name, tensor in net.state_dict().items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape),
                        "data_offsets": [at, at + 2 * tensor.numel()]}  # fmt: skip
        at += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with (place / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        block = (torch.randn(1 << 20) / 30).half().numpy().tobytes()
        for start in range(0, at, len(block)):
            file.write(block[: min(len(block), at - start)])
    return at


class Given(Model):
    """A model that is given its token embeddings, and whose denoiser takes no memory."""

    def __init__(self, model: str, checkpoint: Checkpoint | None = None) -> None:
        spec = MODELS[model]
        self.spec = spec
        self.family = registry.get("families", spec["family"])
        super().__init__(SimpleNamespace(**{self.family.denoiser: network(model)}), model)
        self.stored = checkpoint.read if checkpoint else None
        # Tokens are windows of one long row of random numbers: independent, and at no cost.
        long = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
        self.states = long.unfold(0, spec["width"], 1)

    window = 75

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def knows(self, prompt: str) -> bool:
        return True

    def vocabulary(self) -> tuple[str, ...]:
        return tuple(f"word{i}" for i in range(500))

    def encode(self, prompts: Sequence[str]) -> Text:
        n, tokens = len(prompts), self.spec["tokens"]
        count = torch.tensor([self.count_tokens(prompt) for prompt in prompts])
        place = torch.arange(tokens)
        own = (place >= 1) & (place <= count[:, None])
        words = [[crc32(word.encode()) % 40000 for word in prompt.split()] for prompt in prompts]
        ids = torch.ones(n, tokens, dtype=torch.int64)
        for row, some in enumerate(words):
            ids[row, 1 : 1 + len(some)] = torch.tensor(some, dtype=torch.int64)
        pooled = self.spec["pooled"]
        whole = [row.numpy().tobytes() for row in ids]
        drawn = [torch.Generator().manual_seed(crc32(row)) for row in whole] if pooled else []
        return Text(
            tuple(prompts),
            self.states[self.places(ids)],
            own,
            ids,
            torch.stack([torch.randn(pooled, generator=g) for g in drawn]) if pooled else None,
        )

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Where each token's window begins, (n, tokens): what the token's text encoder knows decides."""
        found = []
        for row in ids.tolist():
            # T5 reads a prompt as a whole, the others what stands before a token.
            known = crc32(repr(row).encode()) if self.spec["family"] == "flux" else 0
            for token in row:
                known = crc32(token.to_bytes(8, "little"), known)
                found.append(known % len(self.states))
        return torch.tensor(found).reshape(ids.shape)

    def text_entries(self) -> Any:
        return self.family.text_entries(self)

    def pooled_entries(self) -> Any:
        return self.family.pooled_entries(self)

    @property
    def network(self) -> Any:
        return getattr(self.pipe, self.family.denoiser)

    def _absent(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    predict = trajectory = decode = encode_images = log_snr = add_noise = cross_attentions = _absent
    del _absent


def run(model: str, method: str, concepts: int, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of the closed form and of the export."""
    checkpoint = Checkpoint.find(folder / "in")
    given = Given(model, checkpoint)
    problem = Problem(tuple(Concept(f"concept number {i}", "sky") for i in range(concepts)))
    cls = registry.get("methods", method)
    made = cls(**fields_of(model, method))
    clocks = [(time.perf_counter(), time.process_time())]

    def stop() -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    changes = made.fit(given, problem, RunContext())
    stop()
    record = Record(method, {}, problem, model, "", 0, 0.0, {})
    edit = Edit(changes, replace(record, base=hash_base(checkpoint.read, list_places(changes))))
    at_solved = peak()
    stop()
    # Weights near a gated edit are fitted to what the text encoder says, and here there is none.
    if all(isinstance(change, WeightChange) for change in changes):
        export(edit, "diffusers", checkpoint, folder / "out")
        stop()
    seconds = {}
    for part, before, after in zip(PARTS, clocks, clocks[1:], strict=False):
        for kind, a, b in zip(("s", "processor s"), before, after, strict=True):
            seconds[f"{part}, {kind}"] = b - a
    return {
        **seconds,
        "peak of the closed form, GB": at_solved / 1e9,
        "peak, GB": peak() / 1e9,
        "changed tensors": len(list_places(changes)),
    }


def fields_of(model: str, method: str) -> dict[str, Any]:
    """The method's fields, where they are not its own."""
    if method == "uce":
        return MODELS[model]["uce"]
    if method == "sluice":
        return {}
    return {"ridge": 1.0, "stages": ("refine", "fuse"), **MODELS[model].get("mace", {})}


def peak() -> int:
    """The largest memory this process has had, in bytes."""
    # `ru_maxrss` would count the parent's, too.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--method", choices=["uce", "mace", "sluice"], default="uce")
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where to write the weights; by default a new one")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "true_size.json")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="true-size-", dir=options.folder))
    try:
        size = write(options.model, folder / "in")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(run, (options.model, options.method, options.concepts, folder))
    finally:
        shutil.rmtree(folder)
    row = {
        "model": options.model,
        "method": options.method,
        "fields": fields_of(options.model, options.method),
        "concepts": options.concepts,
        "denoiser, GB": size / 1e9,
        **{key: round(value, 3) for key, value in found.items()},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps(row, indent=1))
    rows = json.loads(options.to.read_text()) if options.to.exists() else []
    key = (row["model"], row["method"])
    rows = [*(other for other in rows if (other["model"], other["method"]) != key), row]
    with replacing(options.to) as file:
        file.write_text(json.dumps(rows, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
