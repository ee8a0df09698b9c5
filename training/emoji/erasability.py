"""The erasability curve: how much room a text tower of a given width leaves for closed-form erasing.

A matrix M is fitted so that the prompts of half the flags go where "a flag" goes, while the other half and general
captions stay: M = (C + w P + r I)(G + w P + r I)^-1, with G and C the sums of e_f e_f' and e_g e_f' over erased tokens
and P the mean of e_p e_p' over kept ones. On templates that took no part in the fit, two figures:
residual  |M e_f - e_g| / |e_f - e_g|       how much of the erased is left (0 is gone)
drift     |M e_k - e_k| / distance between two flags     how far the kept moved (0 is untouched)
A width is good when some weight and ridge leave both small.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from training.emoji.clip import SmallCLIP, build_text, tokens_of
from training.emoji.scenes import HELD_OUT_TEMPLATES, TEMPLATES, SceneMaker
from training.emoji.world import World, load_drawings, place_options, read_world


def train_text(width: int, layers: int, steps: int, work: Path, world: World, tokenizer) -> CLIPTextModel:
    """A text tower trained on words alone: what a caption tells of its scene."""
    torch.manual_seed(0)
    maker = SceneMaker(world, load_drawings(world, work), seed=5)
    clip = SmallCLIP(build_text(width, layers, tokenizer), None, world)
    optimiser = torch.optim.AdamW(clip.parameters(), lr=7e-4, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 7e-4 * min(1, (step + 1) / 20) * min(1, (steps - step) / (0.3 * steps))
        scenes = maker.make(64)
        loss, _ = clip.loss(tokens_of(tokenizer, scenes.captions), scenes)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return clip.text


@torch.no_grad()
def states(text: CLIPTextModel, tokenizer, captions: list[str], pads: int = 4) -> list[torch.Tensor]:
    """Per caption the states of its words, its end token and `pads` paddings: (tokens, width) in float64."""
    ids = tokenizer(captions, padding="max_length", max_length=40, truncation=True, return_tensors="pt").input_ids
    out = text(input_ids=ids).last_hidden_state.double()
    lengths = (ids != tokenizer.eos_token_id).sum(1) + 1
    return [row[1 : n + pads] for row, n in zip(out, lengths.tolist(), strict=True)]


def flag_pairs(text, tokenizer, countries: list[str], templates) -> tuple[torch.Tensor, torch.Tensor]:
    """Erased tokens and where they should go. The prompt ends in the country; "a flag" is matched from the end:
    the country's tokens go to the word "flag", the end token and the padding to their like."""
    sources, targets = [], []
    goals = dict(zip(templates, states(text, tokenizer, [t.format("a flag") for t in templates]), strict=True))
    prompts = [(t, t.format(f"the flag of {country}")) for t in templates for country in countries]
    for (template, _), rows in zip(prompts, states(text, tokenizer, [p for _, p in prompts]), strict=True):
        goal = goals[template]
        shared = tokenizer(template.format("the flag"), add_special_tokens=False).input_ids
        own = rows[len(shared) :]
        tail = goal[-5:]
        word = goal[-6].expand(len(own) - len(tail), -1)
        sources.append(own)
        targets.append(torch.cat([word, tail]))
    return torch.cat(sources), torch.cat(targets)


def curve(text: CLIPTextModel, tokenizer, world: World, captions: list[str]) -> list[dict[str, float]]:
    countries = [label.name.removeprefix("flag: ") for label in world.group("flags")]
    erased, kept = countries[::2], countries[1::2]
    train, test = list(dict.fromkeys(TEMPLATES)), list(HELD_OUT_TEMPLATES)
    e_f, e_g = flag_pairs(text, tokenizer, erased, train)
    stay, _ = flag_pairs(text, tokenizer, kept, train)
    stay = torch.cat([stay, *states(text, tokenizer, captions)])
    test_f, test_g = flag_pairs(text, tokenizer, erased, test)
    test_k, _ = flag_pairs(text, tokenizer, kept, test)
    between = torch.cdist(test_k[:400], test_k[:400]).mean()
    gram, cross, prior = e_f.T @ e_f / len(e_f), e_g.T @ e_f / len(e_f), stay.T @ stay / len(stay)
    eye = torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean()
    rows = []
    for weight, ridge in product((0.1, 0.3, 1.0, 3.0, 10.0), (1e-4, 1e-3, 1e-2)):
        right = gram + weight * prior + ridge * eye
        factor = torch.linalg.solve(right, cross + weight * prior + ridge * eye, left=False)
        residual = (test_f @ factor.T - test_g).norm(dim=1).mean() / (test_f - test_g).norm(dim=1).mean()
        drift = (test_k @ factor.T - test_k).norm(dim=1).mean() / between
        rows.append({"weight": weight, "ridge": ridge, "residual": residual.item(), "drift": drift.item()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place_options(parser)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 768])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--shipped", type=Path, help="also measure this trained text encoder")
    parser.add_argument("--to", type=Path, default=Path("training/emoji/erasability.json"))
    options = parser.parse_args()
    world = read_world(options.world)
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    maker = SceneMaker(world, load_drawings(world, options.work), seed=6)
    captions = [c for c in (maker.one()[2] for _ in range(2000)) if "flag" not in c][:1000]
    results = json.loads(options.to.read_text()) if options.to.exists() else {}
    for width in options.widths:
        began = time.time()
        text = train_text(width, options.layers, options.steps, options.work, world, tokenizer)
        results[f"{width} wide, {options.steps} steps on words"] = curve(text, tokenizer, world, captions)
        print(width, f"{time.time() - began:.0f} s", flush=True)
        options.to.write_text(json.dumps(results, indent=1) + "\n")
    if options.shipped:
        text = CLIPTextModel.from_pretrained(options.shipped)
        results["shipped"] = curve(text, tokenizer, world, captions)
        options.to.write_text(json.dumps(results, indent=1) + "\n")
    for name, rows in results.items():
        best = min(rows, key=lambda row: max(row["residual"], row["drift"]))
        print(f"{name}: residual {best['residual']:.3f} at drift {best['drift']:.3f} ({best})")


if __name__ == "__main__":
    main()
