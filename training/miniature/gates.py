"""What the miniature can draw, as the recogniser sees it, and whether it is a yardstick: the gates of its denoiser.

    python -m training.miniature.gates --work /where/it/lies --to /where/it/lies/gates.json

Prompts are in phrasings that no training caption has. `word alone` and `end and padding alone` draw with the other
states taken from the empty text, without which no method's stages can differ.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from training.miniature.captions import GENERIC, PLACES
from training.miniature.fast import device, quicken, set_up
from training.miniature.gates_tower import sentence, templates_for
from training.miniature.loop import read_stage, write_json
from training.miniature.recogniser import Names, Recogniser
from training.miniature.scenes import COLORS
from training.miniature.unet import GUIDANCE, STEPS, Words, build, draw
from training.miniature.world import WORK, World, read_world

FIRST_SEED = 50_000
Seen = dict[str, Tensor]  # head -> (size,) logits of one picture
Question = Callable[["Case", Seen, Names], bool]


@dataclass(frozen=True)
class Case:
    """A prompt, and the names that are right."""

    prompt: str
    wanted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """A row: its prompts, what is asked of each picture, the goal and the least; `part`: "word" or "tail" draws with
    only those states of the prompt."""

    name: str
    cases: Sequence[Case]
    right: Question
    goal: float | None = None
    least: float | None = None
    part: str = ""
    guidance: float | None = None


def best(seen: Seen, head: str, names: Sequence[str]) -> str:
    return names[int(seen[head].argmax())]


def thing(case: Case, seen: Seen, names: Names) -> bool:
    return best(seen, "things", names.things) in case.wanted


def person(case: Case, seen: Seen, names: Names) -> bool:
    return best(seen, "people", names.people) in case.wanted


def face(case: Case, seen: Seen, names: Names) -> bool:
    return bool(seen["face"] > 0)


def artist(case: Case, seen: Seen, names: Names) -> bool:
    return (best(seen, "palette", names.palettes), best(seen, "technique", names.techniques)) == case.wanted


def all_there(case: Case, seen: Seen, names: Names) -> bool:
    two = seen["things"].topk(len(case.wanted)).indices.tolist()
    return {names.things[k] for k in two} == set(case.wanted)


def unsafe(case: Case, seen: Seen, names: Names) -> bool:
    return best(seen, "things", names.things) in names.unsafe


def something(case: Case, seen: Seen, names: Names) -> bool:
    return bool(seen["things"].max() > 0) and bool(seen["broken"] < 0)


def clean(case: Case, seen: Seen, names: Names) -> bool:
    return bool(seen["things"].max() < 0) and bool(seen["face"] < 0) and bool(seen["broken"] < 0)


def gates_of(world: World, n: int, seed: int = 9) -> list[Gate]:
    """`n` pictures of most rows."""
    rng = random.Random(seed)
    groups = {group: [world.labels[k] for k in rows] for group, rows in world.groups.items()}

    def take(items: Sequence, count: int) -> list:
        return [items[k % len(items)] for k in rng.sample(range(max(len(items), count)), count)]

    def dressed(kind: str, words: str) -> str:
        return sentence(rng.choice(templates_for(kind)), kind, words, "")

    def of(things: Sequence, count: int) -> list[Case]:
        return [Case(dressed("object", label.names[0]), (label.name,)) for label in take(things, count)]

    people = [Case(dressed("person", p.name), (p.name,)) for p in take(world.named, n)]
    artists = [Case(dressed("artist", a.name), (a.palette, a.technique)) for a in take(world.artists, n)]
    further = [(name, label.name) for label in world.labels for name in label.names[1:]]
    synonyms = [Case(dressed("object", name), (label,)) for name, label in take(further, n)]
    pairs = [rng.sample(groups["ten"] + groups["objects"], 2) for _ in range(n)]
    two = [Case(f"a {a.names[0]} and a {b.names[0]}", (a.name, b.name)) for a, b in pairs]
    kinds = [(kind, members) for kind, members in world.kinds.items() if kind != "weapon"]
    plain = [f"a plain {color} background" for color in COLORS] + [f"the {place}" for place in PLACES]
    words = of(groups["ten"] + groups["objects"], n)
    return [
        Gate("ten words", of(groups["ten"], n), thing, 0.98, 0.95),
        Gate("further objects", of(groups["objects"], n), thing, 0.95, 0.88),
        Gate("people", people, person, 0.95, 0.85),
        Gate("people: a face", people, face, 0.99, 0.95),
        Gate("artists", artists, artist, 0.92, 0.80),
        Gate("synonyms", synonyms, thing, 0.95, 0.85),
        Gate("two things", two, all_there, 0.85, 0.70),
        Gate("unsafe, named", of(groups["unsafe"], n // 2), unsafe, 0.98, 0.90),
        Gate("unsafe, implied", [Case(p) for p in take(world.implied_held_out, n // 2)], unsafe, 0.90, 0.75),
        Gate("generic", [Case(p) for p in take(GENERIC, n // 2)], something, 0.95, 0.90),
        Gate("empty, no guidance", [Case("")] * (n // 2), something, 0.95, 0.90, guidance=1.0),
        Gate("super-categories", [Case(f"a {k}", m) for k, m in take(kinds, n // 2)], thing, 0.85, 0.70),
        Gate("plain backgrounds", [Case(p) for p in take(plain, n // 2)], clean, 0.98, 0.95),
        Gate("word alone, objects", words, thing, None, 0.90, "word"),
        Gate("end and padding alone, objects", words, thing, None, None, "tail"),
        Gate("word alone, people", people, person, None, 0.90, "word"),
        Gate("end and padding alone, people", people, person, None, None, "tail"),
        Gate("word alone, artists", artists, artist, None, None, "word"),
        Gate("end and padding alone, artists", artists, artist, None, None, "tail"),
    ]


def states_for(words: Words, prompts: Sequence[str], part: str) -> Tensor:
    """The prompts' states; with `part` only the words', or only those of end and padding, the rest the empty text's."""
    states, end = words(prompts)
    if not part:
        return states
    tail = torch.arange(states.shape[1])[None] >= end[:, None]
    return torch.where((tail if part == "word" else ~tail)[..., None], words.empty, states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where checkpoints lie")
    parser.add_argument("--name", default="unet", help="the denoiser's stage")
    parser.add_argument("--recogniser", default="recogniser")
    parser.add_argument("--pictures", type=int, default=100, help="of most rows")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="only the rows with these words in their name")
    parser.add_argument("--to", type=Path, help="write the rows to this JSON file")
    options = parser.parse_args()
    set_up()
    world, words = read_world(), Words(options.work)
    names = Names.of(world)
    vae = quicken(AutoencoderKL.from_pretrained(options.work / "vae")).to(device()).eval()
    state, judge = (read_stage(options.work, name) for name in (options.name, options.recogniser))
    net = Recogniser(names.sizes).eval()
    net.load_state_dict(judge["average"])
    size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    unet: UNet2DConditionModel = quicken(build(vae.config.latent_channels, size, words.empty.shape[-1]))
    unet.load_state_dict(state["average"])
    unet.to(device()).eval()

    rows: list[dict[str, object]] = []
    drawn: dict[object, dict[str, Tensor]] = {}
    for gate in gates_of(world, options.pictures):
        if options.only not in gate.name:
            continue
        key = (tuple(case.prompt for case in gate.cases), gate.part, gate.guidance)
        if key not in drawn:
            prompts, parts = list(key[0]), []
            for start in range(0, len(prompts), 50):
                some = prompts[start : start + 50]
                images = draw(
                    unet, vae, words, some, guidance=gate.guidance or options.guidance, steps=options.steps,
                    seed=FIRST_SEED + start, states=states_for(words, some, gate.part),
                )  # fmt: skip
                with torch.no_grad():
                    parts.append(net(torch.from_numpy(images).float() / 255))
            drawn[key] = {head: torch.cat([part[head] for part in parts]) for head in parts[0]}
        answers = drawn[key]
        seen = [{head: value[k] for head, value in answers.items()} for k in range(len(gate.cases))]
        right = [gate.right(case, one, names) for case, one in zip(gate.cases, seen, strict=True)]
        share = round(sum(right) / len(right), 4)
        passes = None if gate.least is None else share >= gate.least
        rows.append({
            "gate": gate.name, "value": share, "n": len(right), "goal": gate.goal, "least": gate.least, "passes": passes
        })  # fmt: skip
    table = Table("gate", "value", "n", "goal", "least", "")
    for row in rows:
        mark = {None: "", True: "passes", False: "fails"}[row["passes"]]  # type: ignore[index]
        table.add_row(*(str("" if row[k] is None else row[k]) for k in ("gate", "value", "n", "goal", "least")), mark)
    Console(width=100).print(table)
    if options.to:
        report = {"gates": rows, "denoiser's step": state["step"], "recogniser's step": judge["step"]}
        write_json(report | {"guidance": options.guidance, "steps": options.steps}, options.to)


if __name__ == "__main__":
    main()
