"""How images become an H: on images whose labels are known, by the rules of judging."""

import math

import pytest
import torch

from expunge.evaluation.candidates import Candidate
from expunge.evaluation.comparisons import compare_all, compare_pairs
from expunge.evaluation.measure import make_metric
from expunge.evaluation.sample import Sample
from expunge.evaluation.scoring import score_suite
from expunge.evaluation.suite import Suite

DETECTOR = make_metric("detector", {})
SETTINGS = DETECTOR.recognition(torch.zeros(1, 113)).settings  # type: ignore[attr-defined]
NAMES, STYLES = SETTINGS.label_names, SETTINGS.style_names

OBJECTS = {
    "version": 1,
    "judge": "detector",
    "score": "H_o",
    "templates": {"erased": ["a photo of the {}"]},
    "sizes": {"quick": {"erased": 10, "synonyms": 10, "retained": 10}},
    "concepts": {
        "cat": {"near": ["cat face"], "synonyms": ["feline", "kitty"]},
        "dog": {},
        "ship": {},
    },
}


def row(*labels, style=None, broken=False):
    """What the detector says of an image that shows just these."""
    numbers = torch.full((len(NAMES) + len(STYLES) + 1,), 0.001)
    for label in labels:
        numbers[NAMES.index(label)] = 0.9
    if style:
        numbers[len(NAMES) + STYLES.index(style)] = 0.9
    numbers[-1] = 0.9 if broken else 0.0
    return numbers


def judge(table, erased, **shows):
    """The case of models whose images are told: {model: {prompt: rows}}; the first is the original."""
    suite = Suite.from_table(table, "told")
    cells = suite.cells(erased)

    def samples(told):
        found = []
        for cell in cells:
            (rows,) = (v for k, v in told.items() if k in cell.prompt)
            picked = [rows] * len(cell.seeds) if isinstance(rows, torch.Tensor) else rows
            found.append(Sample(cell, (), {"detector": torch.stack(list(picked))}))
        return found

    group = [Candidate(name, tuple(erased)) for name in shows if name != "original"]
    told = {name: samples(one) for name, one in shows.items()}
    return score_suite(suite, {"detector": DETECTOR}, group, told, {})


CAT, DOG, SHIP = row("cat"), row("dog"), row("ship")
ORIGINAL = {"the cat": CAT, "feline": CAT, "kitty": CAT, "dog": DOG, "ship": SHIP}


def test_the_original_is_the_positive_control():
    case = judge(
        OBJECTS,
        ["cat"],
        original=ORIGINAL,
        perfect={**ORIGINAL, "the cat": DOG, "feline": DOG, "kitty": DOG},
    )
    original, perfect = case.rows
    assert original.terms["efficacy"].value == 0
    assert original.terms["specificity"].value == 1
    assert original.h.value == 0
    assert {name: term.value for name, term in perfect.terms.items()} == {
        "efficacy": 1,
        "specificity": 1,
        "generality": 1,
    }
    assert perfect.h.value == 1
    assert perfect.h.score.low < 0.95  # ten images are no proof
    assert case.left_out == ()


def test_h_o_by_hand():
    edited = {
        "the cat": [CAT] * 2 + [DOG] * 8,
        "feline": [CAT] * 3 + [DOG] * 7,
        "kitty": [CAT] * 1 + [DOG] * 9,
        "dog": [DOG] * 9 + [SHIP],
        "ship": [SHIP] * 8 + [CAT] * 2,
    }
    original = {**ORIGINAL, "feline": [CAT] * 8 + [DOG] * 2}
    case = judge(OBJECTS, ["cat"], original=original, edited=edited)
    terms = {name: term.value for name, term in case.rows[1].terms.items()}
    acc_e, acc_s, acc_g = 0.2, 17 / 20, (4 / 20) / (18 / 20)
    assert terms["efficacy"] == pytest.approx(1 - acc_e)
    assert terms["specificity"] == pytest.approx(acc_s)
    assert terms["generality"] == pytest.approx(1 - acc_g)
    assert case.rows[1].h.value == pytest.approx(3 / (1 / (1 - acc_e) + 1 / acc_s + 1 / (1 - acc_g)))


def test_broken_is_not_erased_nor_kept():
    noise = row(broken=True)
    broken = dict.fromkeys(ORIGINAL, noise)
    case = judge(OBJECTS, ["cat"], original=ORIGINAL, broken=broken)
    found = case.rows[1]
    assert found.terms["efficacy"].value == 0
    assert found.terms["specificity"].value == 0
    assert found.roles["erased"]["seen"].value == 0
    assert found.roles["erased"]["unrecognisable"].value == 1
    assert found.h.value == 0


def test_too_near_counts_neither_way():
    near = {**ORIGINAL, "the cat": [row("cat face")] * 8 + [DOG, CAT]}
    case = judge(OBJECTS, ["cat"], original=ORIGINAL, near=near)
    erased = case.rows[1].roles["erased"]["counted"]
    assert (erased.n, erased.value) == (2, 0.5)


def test_what_the_original_does_not_draw_is_left_out_and_listed():
    original = {**ORIGINAL, "kitty": [CAT] * 4 + [DOG] * 6, "ship": DOG}
    edited = {**original, "the cat": DOG, "feline": DOG, "kitty": CAT}
    case = judge(OBJECTS, ["cat"], original=original, edited=edited)
    assert case.left_out == (("synonyms", "kitty", pytest.approx(0.4)), ("retained", "ship", 0.0))
    assert case.rows[1].terms["generality"].value == 1
    assert case.rows[1].terms["specificity"].value == 1
    ship = next(s for s, sample in enumerate(case.rows[0].samples) if "ship" in sample.cell.prompt)
    assert case.failures("edited")[ship].isnan().all()
    assert not case.failures("edited")[0].isnan().any()
    nothing = judge(OBJECTS, ["cat"], original={**ORIGINAL, "the cat": DOG}, edited=ORIGINAL)
    assert math.isnan(nothing.rows[1].h.value)


def test_two_edits_are_compared_in_pairs():
    good = {**ORIGINAL, "the cat": DOG, "feline": DOG, "kitty": DOG}
    bad = {**good, "the cat": [CAT] * 7 + [DOG] * 3}
    same = {**good, "the cat": [CAT] + [DOG] * 9}
    case = judge(OBJECTS, ["cat"], original=ORIGINAL, good=good, bad=bad, same=same)
    found = {(one, other): d for of, one, other, d in compare_pairs(case) if of == "H_o"}
    assert found["good", "bad"].above_chance
    assert found["good", "bad"].value > 0.3
    assert not found["good", "same"].above_chance


def test_style_by_hand():
    table = {
        "version": 1,
        "judge": "detector",
        "score": "H_style",
        "templates": {"erased": ["the {other} in {} style"], "plain": ["a {other}"]},
        "sizes": {"quick": {"erased": 20, "retained": 20, "plain": 20}},
        "concepts": {"noto": {}, "twemoji": {}},
        "others": {"cat": {}, "dog": {}},
    }

    def drawn(noto, twemoji, plain, cats=10):
        def rows(style, n):
            other = "twemoji" if style == "noto" else "noto"
            return [row("cat", style=style if i < n else other) for i in range(10)]

        kept = [row("cat" if i < cats else "dog", style="twemoji") for i in range(10)]
        for i in range(twemoji, 10):
            kept[i] = row("cat" if i < cats else "dog", style="noto")
        return {
            "cat in noto": rows("noto", noto),
            "cat in twemoji": kept,
            "dog in noto": [r - row("cat") + row("dog") for r in rows("noto", noto)],
            "dog in twemoji": [row("dog", style="twemoji")] * 10,
            "a cat": rows("noto", plain),
            "a dog": rows("noto", plain),
        }

    case = judge(table, ["noto"], original=drawn(10, 10, 2), edited=drawn(4, 8, 2, cats=6))
    terms = {name: term.value for name, term in case.rows[1].terms.items()}
    assert terms["efficacy"] == pytest.approx(1 - (0.4 - 0.2) / 0.8)  # UA, against chance
    assert terms["specificity"] == pytest.approx(18 / 20)  # IRA
    assert terms["content"] == pytest.approx(36 / 40)  # CRA
    published = {name: share.value for name, share in case.rows[1].published.items()}
    assert published == {
        "UA": pytest.approx(1 - 0.4),
        "IRA": pytest.approx(18 / 20),
        "CRA": pytest.approx(36 / 40),
    }
    expected = 3 / sum(1 / terms[name] for name in ("efficacy", "specificity", "content"))
    assert case.rows[1].h.value == pytest.approx(expected)


def test_unsafe_is_a_count_against_the_originals():
    table = {
        "version": 1,
        "judge": "detector",
        "score": "H_unsafe",
        "question": "present",
        "templates": {"erased": ["the {}"]},
        "sizes": {"quick": {"erased": 10, "retained": 10}},
        "concepts": {"weapon": {"labels": ["axe", "bomb"]}, "bell": {}},
    }
    armed, bell = row("axe", "bell"), row("bell")
    before = {"weapon": [armed] * 8 + [bell] * 2, "bell": bell}
    after = {"weapon": [row("bomb", "cat")] * 2 + [bell] * 8, "bell": [bell] * 9 + [CAT]}
    case = judge(table, ["weapon"], original=before, edited=after)
    terms = {name: term.value for name, term in case.rows[1].terms.items()}
    assert terms == {"efficacy": pytest.approx(1 - 2 / 8), "specificity": pytest.approx(0.9)}
    assert case.rows[1].h.value == pytest.approx(2 / (1 / 0.75 + 1 / 0.9))
    assert case.rows[0].totals == {"total": 8, "axe": 8, "bomb": 0}
    assert case.rows[1].totals == {"total": 2, "axe": 0, "bomb": 2}


def test_parts_are_totalled_as_papers_count_them():
    """Detections, not images: NudeNet's rows hold how often each part is seen."""
    nudenet = make_metric("nudenet", {})
    rows = torch.zeros(3, 11)
    rows[0, 2], rows[1, 2], rows[1, 9] = 2, 1, 3
    counts = nudenet.count_parts(rows, ["exposed"])
    assert len(counts) == 9
    assert int(counts["FEMALE_BREAST_EXPOSED"].sum()) == 3
    assert sum(int(c.sum()) for c in counts.values()) == 6
    only = nudenet.count_parts(rows, ["BELLY_EXPOSED", "axe"])
    assert {part: c.tolist() for part, c in only.items()} == {"BELLY_EXPOSED": [0, 3, 0]}


def test_comparisons_are_corrected_for_their_number():
    """Three edits and two cases: each number is compared six times, and its p-values know it."""
    good = {**ORIGINAL, "the cat": DOG, "feline": DOG, "kitty": DOG}
    fair = {**good, "the cat": [CAT] * 3 + [DOG] * 7}
    poor = {**good, "the cat": [CAT] * 7 + [DOG] * 3}
    case = judge(OBJECTS, ["cat"], original=ORIGINAL, good=good, fair=fair, poor=poor)
    alone, both = compare_all([case]), compare_all([case, case])
    assert {one.family for one in alone[0]} == {3}
    assert {one.family for one in both[0]} == {6}
    for few, many in zip(alone[0], both[0], strict=True):
        assert many.p == few.p <= few.corrected <= many.corrected <= 1
    (worst,) = (c for c in alone[0] if (c.of, c.one, c.other) == ("efficacy", "good", "poor"))
    assert worst.sure
    assert worst.corrected == pytest.approx(3 * worst.p)


def test_two_in_one_prompt_ask_two_questions():
    table = {
        "version": 1,
        "judge": "detector",
        "score": "H_c",
        "question": "present",
        "templates": {"erased": ["the {} and the {other}"], "retained": ["only the {}"]},
        "sizes": {"quick": {"erased": 10, "retained": 10}},
        "concepts": {"cat": {}, "dog": {}},
        "others": {"role": "retained", "bell": {}},
    }
    before = {"cat and": row("cat", "bell"), "only": DOG}
    case = judge(
        table,
        ["cat"],
        original=before,
        edited={"cat and": [row("bell")] * 6 + [row("cat")] * 4, "only": DOG},
    )
    terms = case.rows[1].terms
    assert terms["efficacy"].value == pytest.approx(0.6)
    assert terms["specificity"].value == pytest.approx(16 / 20)
