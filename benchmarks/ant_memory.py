"""What the as-released many-concept training of ANT needs of memory, at Stable Diffusion 1.4's size.

Nothing is computed: the denoiser is built and called with tensors that have shapes and no numbers, as
`train_factors` calls it, and counted is what backpropagation keeps of one call, each storage once,
beside the weights, the low-rank changes (rank 64, in transformer, residual and sampler blocks), their
gradients and AdamW's two means, all in float32. A processor or GPU needs somewhat more while it works.
Writes `benchmarks/results/ant_memory.json`.

    python benchmarks/ant_memory.py
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.base.files import replacing
from expunge.erasing.parameters import BLOCKS
from expunge.methods.ant import ANT
from expunge.ops.low_rank import use_own_factors

FILE = Path(__file__).parent / "results" / "ant_memory.json"
LIMIT = 24.0
"""GB of an accelerator that it should fit in."""
METHOD = ANT.preset("identity")
GB = 1e9


def size(tensor: Tensor) -> int:
    """Bytes of its storage."""
    return tensor.untyped_storage().nbytes()


def measured(concepts: int, rows: int) -> dict[str, Any]:
    """GB that each part takes, for so many concepts and so many rows with gradients at once."""
    with FakeTensorMode():
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        for parameter in unet.parameters():
            parameter.requires_grad_(False)
        modules = dict(unet.named_modules())
        blocks = tuple(f"{k}." for k, m in modules.items() if type(m).__name__ in BLOCKS)
        layers = [
            m
            for k, m in modules.items()
            if isinstance(m, (nn.Linear, nn.Conv2d)) and k.startswith(blocks)
        ]
        ups = [torch.zeros(concepts, m.weight.shape[0], METHOD.low_rank.rank) for m in layers]
        downs = [torch.zeros(concepts, METHOD.low_rank.rank, m.weight.shape[1:].numel()) for m in layers]
        for factor in (*ups, *downs):
            factor.requires_grad_()
        weights = sum(map(size, unet.parameters()))
        known = {p.untyped_storage()._cdata for p in (*unet.parameters(), *ups, *downs)}
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage()._cdata
            if place not in known:
                kept[place] = (size(tensor), tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            use_own_factors(layers, ups, downs, METHOD.low_rank.alpha / METHOD.low_rank.rank),
        ):
            answer = unet(
                torch.zeros(rows, 4, 64, 64),
                torch.zeros(rows, dtype=torch.int64),
                encoder_hidden_states=torch.zeros(rows, 77, 768),
            ).sample
        assert answer.requires_grad
        factors = sum(map(size, (*ups, *downs)))
        activations = sum(n for n, _ in kept.values())
    total = weights + 4 * factors + activations
    return {
        "concepts together": concepts,
        "rows at once": rows,
        "weights": round(weights / GB, 2),
        "changes, gradients and means": round(4 * factors / GB, 2),
        "kept for backpropagation": round(activations / GB, 2),
        "a row": round(activations / rows / GB, 2),
        "in all": round(total / GB, 2),
        f"below {LIMIT:g}": total / GB < LIMIT,
    }


def main() -> None:
    """Count, print, write."""
    together = METHOD.fit_together(METHOD.rows_per_sample)
    asked = len(METHOD.trajectory_config.objective.of_student)
    rows = {
        "as it is trained": measured(together, METHOD.micro_batch),
        "one concept": measured(1, 2),
        "all rows of four concepts at once, as before": measured(4, 4 * METHOD.samples * asked),
    }
    for name, row in rows.items():
        print(name, json.dumps(row))
    record = {"preset": "identity", "unit": "GB", "rows": rows, "torch": version("torch"),
              "diffusers": version("diffusers"), "processor": os.uname().machine}  # fmt: skip
    with replacing(FILE) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
