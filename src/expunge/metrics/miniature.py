"""The miniature model's recogniser: which things, people and artists an image shows, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.metric import Classifier, is_blank
from expunge.metrics._clip import resized
from expunge.metrics._miniature import ByRecogniser
from expunge.miniature.recogniser import (
    FOLDER,
    NO_ARTIST,
    NOTHING,
    SIZE,
    SOMEONE,
    UNRECOGNISABLE,
    Recognition,
)


@dataclass(frozen=True)
class MiniatureRecogniser(ByRecogniser, Classifier):
    """The probabilities of things, people, palettes, techniques, design sets, a face, and *broken*.

    Things, people, artists and design sets are asked for by name. Who a person is, is asked among images
    with a face, as in MACE's protocol: without one there is no answer, and `face_ratio` tells how many
    have one. An artist is seen where palette and technique are both right; `near_artist` counts the
    images in which one of them is. Blank images, and those that are no numbers, are unrecognisable.
    """

    folder: str = ""
    """Another recogniser's folder; by default the one that ships."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The hash of its weights, how much it knows, thresholds, and accuracy on unseen drawings."""
        one = self._recogniser
        held_out = (Path(self.folder) if self.folder else FOLDER) / "held_out.json"
        return {
            "sha256": one.digest,
            **{kind: len(getattr(one.names, kind)) for kind in ("things", "people", "styles")},
            "artists": len(one.artists),
            "thresholds": asdict(one.thresholds),
            "held out": json.loads(held_out.read_text("utf8")) if held_out.is_file() else None,
        }

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the probabilities of all heads, (n, width); the last is that of *broken*.

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        # nan would come out as nan, and rows are kept as numbers: black is unrecognisable, too.
        rows = self._recogniser(resized(images.nan_to_num(), SIZE)).rows.clone()
        rows[is_blank(images), -1] = 1.0
        return rows

    def recognition(self, rows: Tensor) -> Recognition:
        """What was measured, in the recogniser's own words."""
        return self._recogniser.recognition(rows)

    def knows(self, label: str) -> bool:
        """Return whether the label is among its own."""
        return self._recogniser.knows(label)

    def score(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        """Return whether one of the labels is what images show, (n,) in [0, 1], or nan.

        Args:
            rows: (n, width), from `measure`.
            labels: those that count as the concept; those of the first one's kind are asked for.
            near: labels whose images count neither way.
            question: "top1", "present" or "probability".

        Raises:
            ExpungeError: the recogniser knows none of the labels; the nearest to the first is named.
        """
        one, seen = self._recogniser, self.recognition(rows)
        known = [label for label in labels if self.knows(label)]
        kind = one.kind(known[0] if known else labels[0])
        wanted = [label for label in known if one.kind(label) == kind]
        if kind == "artists":
            return _score_artists(seen, wanted, near, question)
        if kind == "styles":
            # One image has one design set, and several things: sets compete among themselves alone.
            if question == "probability":
                return seen.probability(kind, wanted)
            places = torch.tensor([seen.names.styles.index(style) for style in wanted])
            return torch.isin(seen.head(kind).argmax(1), places).float()
        if question == "present":
            return (seen.probability(kind, wanted) >= seen.thresholds.present).float()
        if question == "probability":
            answers = seen.probability(kind, wanted)
        else:
            tops = seen.top(kind)
            answers = torch.tensor(
                [float("nan") if top in near else float(top in wanted) for top in tops]
            )
        # As the papers ask: who it is, among images with a face.
        return answers.masked_fill(~seen.has_face(), float("nan")) if kind == "people" else answers

    def find_broken(self, rows: Tensor) -> Tensor:
        """Return which images are unrecognisable, (n,) bool."""
        return self.recognition(rows).is_broken()

    def describe(self, rows: Tensor) -> list[str]:
        """Return the best thing or person of each image, and by which artist it is."""
        seen = self.recognition(rows)
        by = {traits: artist for artist, traits in seen.artists.items()}
        found = []
        for thing, person, face, broken, traits in zip(
            seen.top("things"),
            seen.top("people"),
            seen.has_face().tolist(),
            seen.is_broken().tolist(),
            seen.top_traits(),
            strict=True,
        ):
            what = " and ".join(filter(None, ((person or SOMEONE) if face else "", thing))) or NOTHING
            artist = by.get(traits, ", ".join(trait for trait in traits if trait != NO_ARTIST))
            found.append(UNRECOGNISABLE if broken else f"{what} by {artist}" if artist else what)
        return found


def _score_artists(
    seen: Recognition, wanted: Sequence[str], near: Sequence[str], question: str
) -> Tensor:
    """Whether images are by one of some artists; there is one answer to "top1" and "present"."""
    if question == "probability":
        return torch.stack([seen.artist_probability(artist) for artist in wanted]).amax(0)
    right = {seen.artists[artist] for artist in wanted}
    doubtful = {seen.artists[artist] for artist in near if artist in seen.artists}
    tops = seen.top_traits()
    return torch.tensor([float("nan") if top in doubtful else float(top in right) for top in tops])
