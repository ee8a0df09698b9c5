"""How far closed forms move erased and retained names: the miniature's text tower, random projections.

No image is drawn: the tower and the tokenizer of `training/miniature/parts` read prompts, and keys and
values are those of a random U-Net. For a name the outputs of all these layers, one after the other, are
looked at in three places: at its last word, at the end token, and in the padding. In held-out prompts,

* an erased name is *gone* in a place if the nearest of the originals of all names and of the anchor is
  no longer its own, and *moved* is the share of the way to its anchor that it went;
* a retained name is *kept* if its own is the nearest, and *drift* is how far it moved, in units of how
  far its own anchor is away.

`told` names are in the problem's `retain`, `untold` ones are not. H is the harmonic mean of gone and
kept (told and untold), each the mean of the three places; h that of moved, and 1 − drift (told, untold).

    python experiments/tower_states.py tune --methods uce ace:rounds=0 sluice sluice:neighbours=0
    python experiments/tower_states.py report --methods uce sluice
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import expunge
from expunge import Concept, Model, Problem
from expunge.base import registry
from expunge.base.fields import build
from expunge.base.files import replacing
from expunge.changes import Changes
from expunge.erasing.moved_share import _run_layer
from expunge.method import Method
from expunge.problem import Kind
from expunge.text import Text

HERE = Path(__file__).parent
MINIATURE = HERE.parent / "training" / "miniature"
JUDGED = {
    "person": ("a photo of {}", "{} on a beach"),
    "artist": ("a picture of a house by {}", "a horse in the style of {}"),
    "object": ("a photo of the {}", "the {} on a hill"),
}
"""The prompts that are looked at: no method erases or retains anything in them."""
ANCHORS = {"person": "a person", "artist": "an artist", "object": "a thing"}
KINDS: dict[str, Kind] = {"person": "identity", "artist": "style", "object": "object"}
PLACES = ("word", "end", "padding")


def load_model() -> Model:
    """Return the miniature's text tower with a random U-Net of its width behind it."""
    torch.manual_seed(0)
    parts = MINIATURE / "parts"
    tower = CLIPTextModel.from_pretrained(parts / "text_encoder", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=tower.config.hidden_size,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval(),
        text_encoder=tower,
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return expunge.load(pipe)


def read_names() -> dict[str, dict[str, list[str]]]:
    """Return the names of people and artists by kind and by split: erase, retain, tune."""
    found: dict[str, dict[str, list[str]]] = {}
    for kind, file in (("person", "people.toml"), ("artist", "artists.toml")):
        for one in tomllib.loads((MINIATURE / file).read_text("utf8"))[kind]:
            found.setdefault(kind, {}).setdefault(one["split"], []).append(one["name"])
    return found


def split(size: str) -> dict[str, dict[str, list[str]]]:
    """Return by kind what is erased, told to be retained, and watched untold.

    Args:
        size: "tune", of the names for tuning alone; or "report", which has 100 of the others each.
    """
    world = tomllib.loads((MINIATURE / "world.toml").read_text("utf8"))
    found = {}
    for kind, some in read_names().items():
        tune = some["tune"]
        if size == "tune":
            found[kind] = {"erase": tune[:20], "told": tune[20:30], "untold": tune[30:]}
        else:
            found[kind] = {"erase": some["erase"], "told": some["retain"], "untold": tune}
    # Objects are watched alone: an edit for names must not move them.
    found["object"] = {"erase": [], "told": [], "untold": world["tuning"]["objects"]}
    return found


def make_problem(names: Mapping[str, Mapping[str, Sequence[str]]], kinds: Sequence[str]) -> Problem:
    """Return the problem of erasing the names of some kinds, and retaining the told ones of these."""
    erase = tuple(
        Concept(name, ANCHORS[kind], KINDS[kind]) for kind in kinds for name in names[kind]["erase"]
    )
    return Problem(erase, tuple(name for kind in kinds for name in names[kind]["told"]))


def gather(model: Model, changes: Changes, text: Text) -> Tensor:
    """Return the outputs of all text entries at a prompt's places: (prompts, places, width), float32."""
    rows = torch.arange(len(text))
    last = text.content_mask.int().cumsum(1).argmax(1)
    end = text.first_end[:, 0]
    found = []
    for entry in model.text_entries():
        _, after = _run_layer(model, entry.layer, changes, text.embeddings, 1.0)
        padding = torch.stack([after[i, e + 1 : e + 9].mean(0) for i, e in enumerate(end.tolist())])
        found.append(torch.stack([after[rows, last], after[rows, end], padding], 1))
    return torch.cat(found, 2)


def read_kind(model: Model, kind: str, names: Sequence[str], changes: Changes) -> Tensor:
    """Return the outputs of names in the judged prompts: (templates, names, places, width)."""
    # The name's last word stands last in its own template: cut there, as a causal encoder reads.
    found = []
    for template in JUDGED[kind]:
        before, after = template.split("{}")
        text = model.encode([template.format(name) for name in names])
        if after:
            # The word is looked at where it stands, the end and padding where the prompt ends.
            own = gather(model, changes, model.encode([before + name for name in names]))
            whole = gather(model, changes, text)
            whole[:, 0] = own[:, 0]
            found.append(whole)
        else:
            found.append(gather(model, changes, text))
    return torch.stack(found)


def measure(
    model: Model,
    changes: Changes,
    names: Mapping[str, Mapping[str, Sequence[str]]],
    originals: dict[str, Tensor],
) -> dict[str, Any]:
    """Measure what changes do to every kind's names, by kind, role and place."""
    found: dict[str, Any] = {}
    for kind, roles in names.items():
        everyone = [name for some in roles.values() for name in some]
        if kind not in originals:
            originals[kind] = read_kind(model, kind, [*everyone, ANCHORS[kind]], ())
        before, after = originals[kind], read_kind(model, kind, everyone, changes)
        start = 0
        for role, some in roles.items():
            if not some:
                continue
            own = torch.arange(start, start + len(some))
            start += len(some)
            row: dict[str, Any] = {}
            for i, place in enumerate(PLACES):
                x, e, a = after[:, own, i], before[:, own, i], before[:, -1:, i]
                nearest = torch.cdist(x, before[:, :, i]).argmin(2)
                same = float((nearest == own).float().mean())
                way = (a - e).square().sum(2)
                if role == "erase":
                    share = ((x - e) * (a - e)).sum(2) / way
                    row[place] = {"gone": 1 - same, "moved": float(share.clamp(0, 1).mean()),
                                  "least": float(share.amin())}  # fmt: skip
                else:
                    drift = ((x - e).square().sum(2) / way).sqrt()
                    row[place] = {"kept": same, "drift": float(drift.mean()),
                                  "most": float(drift.amax())}  # fmt: skip
            found.setdefault(kind, {})[role] = row
    return found


def harmonic(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 where one is not above 0."""
    return len(values) / sum(1 / v for v in values) if min(values) > 0 else 0.0


def summarize(found: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, float]:
    """Return H, h and the figures that they are of, means over places and kinds."""

    def mean(role: str, figure: str, some: Sequence[str]) -> float:
        values = [place[figure] for kind in some for place in found[kind][role].values()]
        return sum(values) / len(values)

    gone, moved = mean("erase", "gone", kinds), mean("erase", "moved", kinds)
    kept = {role: mean(role, "kept", kinds) for role in ("told", "untold")}
    drift = {role: mean(role, "drift", kinds) for role in ("told", "untold")}
    others = [kind for kind in found if kind not in kinds]
    return {
        "H": harmonic([gone, kept["told"], kept["untold"]]),
        "h": harmonic([moved, 1 - drift["told"], 1 - drift["untold"]]),
        "gone": gone,
        "moved": moved,
        **{f"kept {role}": value for role, value in kept.items()},
        **{f"drift {role}": value for role, value in drift.items()},
        "drift others": mean("untold", "drift", others),
    }


def make_method(spec: str) -> Method:
    """Read METHOD[@PRESET][:FIELD=VALUE,…]."""
    named, _, values = spec.partition(":")
    name, _, preset = named.partition("@")
    cls = registry.get("methods", name)
    fields: dict[str, Any] = (
        {k: v for k, v in cls.presets[preset].items() if k != "about"} if preset else {}
    )
    for pair in filter(None, values.split(",")):
        field, _, value = pair.partition("=")
        try:
            fields[field] = json.loads(value)
        except ValueError:
            fields[field] = tuple(value.split("+")) if "+" in value else value
    return build(cls, fields)


def main() -> None:
    """Make each edit, measure it, and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("size", choices=("tune", "report"))
    parser.add_argument("--kinds", nargs="+", default=["person"], choices=("person", "artist"))
    parser.add_argument("--methods", nargs="+", default=["uce"], metavar="METHOD[@PRESET][:FIELD=VALUE]")
    parser.add_argument("--to", type=Path, help="the file that rows are added to")
    options = parser.parse_args()
    model = load_model()
    originals: dict[Any, Any] = {}
    names = split(options.size)
    problem = make_problem(names, options.kinds)
    file = options.to or HERE / "results" / "ours" / f"tower-{options.size}.json"
    for spec in options.methods:
        method = make_method(spec)
        start = time.process_time()
        edit = expunge.erase(model, problem, method)
        seconds = time.process_time() - start
        found = measure(model, edit.changes, names, originals)
        summary = summarize(found, options.kinds)
        print(spec, {k: round(v, 3) for k, v in summary.items()}, f"{seconds:.1f} s", flush=True)
        record = json.loads(file.read_text("utf8")) if file.is_file() else {}
        text = json.dumps({**summary, "places": found, "processor seconds": seconds})
        rounded = json.loads(text, parse_float=lambda x: round(float(x), 4))
        record.setdefault("+".join(options.kinds), {})[spec] = rounded
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
