"""Strips of images for the page: before and after, and under attack."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

from PIL import Image
from torch import Tensor

from expunge.base.image_files import to_pil
from expunge.evaluation.candidates import CandidateResult, SuiteResult
from expunge.evaluation.image_cache import Cache
from expunge.metric import Classifier

SHOWN = {"erased": 8, "synonyms": 8, "retained": 12}
"""Images of a strip, for each role."""
WIDEST = 128
"""The widest image on the page, in pixels."""
ROLES = {
    "erased": "Erased",
    "synonyms": "Synonyms, which the method was not told of",
    "retained": "Retained",
}
"""Titles of strips."""


def lay_out_strips(cache: Cache, case: SuiteResult, row: CandidateResult) -> dict[str, Any]:
    """Lay out before and after on the same seeds, worst first, for each role.

    Args:
        cache: what holds the images.
        case: the case.
        row: its edit.
    """
    judge = case.judge if isinstance(case.judge, Classifier) else None
    strips = []
    for role, title in ROLES.items():
        places = worst_first(case, row, role)
        if not places:
            continue
        judged = [place for place in places if row.samples[place[1]].cell.targets]
        chosen = places[: SHOWN[role]]
        requests = [row.samples[c].requests[i] for _, c, i in chosen]
        before = cache.draw(case.sources["original"], requests)
        after = cache.draw(case.sources[row.name], requests)
        strips.append(
            {
                "title": title,
                "failing": sum(bad > 0.5 for bad, _, _ in judged),
                "judged": len(judged),
                "of": len(places),
                "pairs": [
                    {
                        "before": encode_data_uri(before[k]),
                        "after": encode_data_uri(after[k]),
                        "prompt": request.prompt,
                        "seed": request.seed,
                        "seen": _seen(judge, case, row, c, i),
                        "wrong": bad > 0.5,
                    }
                    for k, ((bad, c, i), request) in enumerate(zip(chosen, requests, strict=True))
                ],
            }
        )
    return {"name": row.name, "roles": strips}


def worst_first(case: SuiteResult, row: CandidateResult, role: str) -> list[tuple[float, int, int]]:
    """Rank the images of a role, (how badly it fails, sample, place).

    The worst of every prompt comes first, then the next of every prompt, so that a strip shows many
    words. Of like ones, those come first that the original did right, or where something is erased,
    wrong: that drew what should go.

    Args:
        case: the case.
        row: its edit.
        role: whose images.
    """
    ranked = []
    for c, (mine, its) in enumerate(zip(row.samples, case.rows[0].samples, strict=True)):
        if mine.cell.role != role:
            continue
        after, before = (one.failure(case.dropped).tolist() for one in (mine, its))
        turn = 1 if role == "retained" else -1
        order = sorted(
            (-bad, turn * was, i)
            for i, (bad, was) in enumerate(zip(after, before, strict=True))
            if not math.isnan(bad)
        )
        ranked += [(rank, bad, c, i) for rank, (bad, _, i) in enumerate(order)]
    return [(-bad, c, i) for _, bad, c, i in sorted(ranked)]


def _seen(
    judge: Classifier | None, case: SuiteResult, row: CandidateResult, cell: int, image: int
) -> tuple[str, str]:
    """What the judge calls the image before and after."""
    if judge is None:
        return "", ""
    before, after = (
        judge.describe(one.samples[cell].features[case.suite.judge][image : image + 1])[0]
        for one in (case.rows[0], row)
    )
    return before, after


def lay_out_attacks(row: CandidateResult) -> list[dict[str, Any]]:
    """Lay out what attacks bring back of an edit: the images before, after and at each budget."""
    return [
        {
            "title": one.strip.title,
            "rows": [
                {"label": label, "images": [encode_data_uri(image) for image in images]}
                for label, images in one.strip.rows
            ],
            "captions": list(one.strip.captions),
        }
        for one in row.attacks
    ]


def encode_data_uri(image: Tensor) -> str:
    """Return an image (3, height, width) as a data URI, at most 128 pixels wide."""
    one = to_pil(image.nan_to_num())
    data = io.BytesIO()
    if one.width > WIDEST:
        one = one.resize((WIDEST, one.height * WIDEST // one.width), Image.Resampling.LANCZOS)
        one.save(data, "WEBP", quality=85)
        kind = "webp"
    else:
        one.save(data, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
