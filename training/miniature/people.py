"""The fictional people: what each looks like, by rule and with a fixed seed, and how they are drawn.

A person is a head (hairstyle or hat), hair color, skin, beard and glasses; any two differ in at least two of these,
and many in no more than two. Faces (expressions) and the color of the clothes change from image to image. Besides the
named people there are unnamed ones, who answer to "a person" alone.

    python -m training.miniature.people          # writes people.toml
"""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from training.miniature.names import PERSON_FIRST, PERSON_LAST, names, splits

HERE = Path(__file__).parent
NAMED, UNNAMED = 240, 60
PACKAGES = ("@dicebear/core@9.4.3", "@dicebear/open-peeps@9.4.3")

# Heads that can be told apart at 64 pixels. A bare or covered head has no hair color; the cloth of a turban and a
# beanie has the color of the clothes.
HEADS = """afro bangs bangs2 bantuKnots bun bun2 buns cornrows cornrows2 dreads1 flatTop flatTopLong grayBun grayMedium
grayShort hatBeanie hatHip hijab long longAfro longCurly medium1 medium2 mediumBangs2 mediumBangs3 mediumStraight mohawk
mohawk2 noHair1 noHair3 pomp shaved1 shaved3 short3 short4 short5 turban twists""".split()
WITHOUT_HAIR = ("noHair1", "turban", "hatBeanie")
HAIR = {"black": "111111", "brown": "70401f", "blond": "dba62c", "red": "cc3a08", "gray": "9c9c9c", "pink": "ee6fa8",
        "blue": "2f62c8", "green": "3f9a4c", "purple": "8a3fb0",
        "turquoise": "1fb5ad"}  # fmt: skip
SKIN = {"pale": "ffdfc0", "tan": "dd9c63", "brown": "a8582a", "dark": "5f4331"}
BEARDS = {"none": "", "full": "full3", "goatee": "goatee2", "walrus": "moustache2", "curled": "moustache3",
          "long": "moustache8"}  # fmt: skip
GLASSES = {"none": "", "eyepatch": "eyepatch", "white": "glasses4", "dark": "sunglasses"}
FACES = {  # expression: what captions call it
    "smile": "smiling", "smileBig": "grinning", "smileLOL": "laughing", "smileTeethGap": "with a toothy smile",
    "calm": "looking calm", "cute": "looking cute", "blank": "with a blank look", "serious": "looking serious",
    "solemn": "looking solemn", "tired": "looking tired", "suspicious": "looking suspicious", "driven": "looking driven",
    "cheeky": "looking cheeky", "concerned": "looking worried", "fear": "looking afraid", "hectic": "looking hectic",
    "awe": "looking amazed", "rage": "shouting", "veryAngry": "looking angry", "eyesClosed": "with closed eyes",
    "explaining": "talking", "contempt": "looking scornful",
}  # fmt: skip
CLOTHES = {"red": "e2574c", "orange": "ff9f45", "yellow": "fde05b", "green": "5fc46c", "turquoise": "6fd0d6",
           "blue": "5f86dc", "pink": "e279c7", "white": "f4f4f4"}  # fmt: skip


Looks = tuple[str, str, str, str, str]  # head, hair, skin, beard, glasses


@dataclass(frozen=True)
class Person:
    name: str  # "" for the unnamed
    head: str
    hair: str  # "" where the head shows none
    skin: str
    beard: str
    glasses: str
    split: str  # "erase", "retain": the suites'; "tune": in no suite; "unnamed"

    @property
    def features(self) -> Looks:
        return self.head, self.hair, self.skin, self.beard, self.glasses


def differences(a: Looks, b: Looks) -> int:
    """In how many features two people differ. Hair counts only where both show some."""
    head, hair, *rest = (x != y for x, y in zip(a, b, strict=True))
    return head + (hair and bool(a[1]) and bool(b[1])) + sum(rest)


def _anyone(rng: random.Random) -> Looks:
    head = rng.choice(HEADS)
    return _consistent(
        (
            head,
            rng.choice(list(HAIR)),
            rng.choice(list(SKIN)),
            rng.choice(list(BEARDS)[1:]) if rng.random() < 0.27 else "none",
            rng.choice(list(GLASSES)[1:]) if rng.random() < 0.36 else "none",
        ),
        rng,
    )


def _consistent(features: Looks, rng: random.Random) -> Looks:
    head, hair, skin, beard, glasses = features
    bare = head in WITHOUT_HAIR and beard == "none"  # a beard shows the color, too
    return head, "" if bare else hair or rng.choice(list(HAIR)), skin, beard, glasses


def _too_many(new: Looks, chosen: list[Looks]) -> bool:
    """Whether a head, or beards or glasses as a whole, would become too common: rare looks are accepted more often."""
    alike = sum(old[0] == new[0] for old in chosen)
    bearded = sum(old[3] != "none" for old in chosen) > 0.63 * len(chosen)
    with_glasses = sum(old[4] != "none" for old in chosen) > 0.63 * len(chosen)
    return alike >= 13 or (bearded and new[3] != "none") or (with_glasses and new[4] != "none")


def _neighbor(features: Looks, rng: random.Random) -> Looks:
    """Someone who differs in two features."""
    other, changed = _anyone(rng), rng.sample(range(5), 2)
    head, hair, skin, beard, glasses = (other[k] if k in changed else features[k] for k in range(5))
    return _consistent((head, hair, skin, beard, glasses), rng)


def choose(seed: int = 21) -> list[Person]:
    """The named people in the order of their names, then the unnamed."""
    rng = random.Random(seed)
    chosen: list[Looks] = []
    while len(chosen) < NAMED + UNNAMED:
        near = len(chosen) > 20 and rng.random() < 0.6
        new = _neighbor(rng.choice(chosen), rng) if near else _anyone(rng)
        if all(differences(new, old) >= 2 for old in chosen) and not _too_many(new, chosen):
            chosen.append(new)
    rng.shuffle(chosen)
    found, parts = names(PERSON_FIRST, PERSON_LAST, NAMED, rng), splits(NAMED, rng)
    people = [Person(name, *looks, part) for name, looks, part in zip(found, chosen[:NAMED], parts, strict=True)]
    people.sort(key=lambda person: person.name)
    return people + [Person("", *features, "unnamed") for features in chosen[NAMED:]]


def specification(person: Person, face: str, clothing: str) -> dict[str, str]:
    """What `people.mjs` is told to draw."""
    return {
        "head": person.head,
        "hair": HAIR.get(person.hair, ""),
        "skin": SKIN[person.skin],
        "beard": BEARDS[person.beard],
        "glasses": GLASSES[person.glasses],
        "face": face,
        "clothing": CLOTHES[clothing],
    }


def svgs(specifications: list[dict[str, str]], folder: Path) -> list[str]:
    """The SVG of each; the npm packages are installed into `folder` where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "@dicebear" / "open-peeps").exists():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", *PACKAGES], cwd=folder, check=True)
    done = subprocess.run(
        ["node", str(HERE / "people.mjs")],
        input=json.dumps(specifications),
        cwd=folder,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    return done.stdout.splitlines()


def main() -> None:
    lines = ["# The fictional people, written by `python -m training.miniature.people`.", ""]
    for person in choose():
        pairs = "\n".join(f'{key} = "{value}"' for key, value in asdict(person).items())
        lines.append(f"[[person]]\n{pairs}\n")
    (HERE / "people.toml").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
