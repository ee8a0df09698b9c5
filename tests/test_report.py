"""From edits to a report: drawn once, written whole, and a page that works in a browser."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, ExpungeWarning, Problem
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.evaluate import evaluate
from expunge.evaluation.experiment import Experiment
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.suite import Suite
from expunge.methods.uce import UCE

TABLE = {
    "version": 1,
    "score": "H_c",
    "num_inference_steps": 2,
    "model": "emoji",  # whose CLIP judges
    "judge": "clip_zeroshot",
    "question": "probability",
    "metrics": ["clip_score", "pixel_distance", "frechet"],
    "templates": {"erased": ["a photo of the {}"]},
    "sizes": {"quick": {"erased": 3, "synonyms": 2, "retained": 2}, "full": {"erased": 4}},
    "concepts": {"airplane": {"synonyms": ["aircraft"]}, "ship": {}, "bird": {}},
    # A judge that says one half of everything: so noise is "drawn right" often enough to be counted.
    "options": {"clip_zeroshot": {"classes": ["airplane", "ship"], "scale": 1e-9}},
}
SUITE_TEXT = """# Tiny.
version = 1
score = "H_o"
model = "emoji"
num_inference_steps = 2
judge = "clip_zeroshot"
question = "probability"
metrics = ["clip_score"]
[templates]
erased = ["a photo of the {}"]
[sizes]
quick = { erased = 2, synonyms = 1, retained = 1 }
[concepts]
"airplane" = { synonyms = ["aircraft"] }
"ship" = {}
[options]
clip_zeroshot = { classes = ["airplane", "ship"], scale = 1e-9 }
"""


@pytest.fixture
def suite():
    return Suite.from_table(TABLE, "tiny")


@pytest.fixture
def edits(model, problem):
    other = Problem((Concept("airplane", "street"),), ("ship",))
    return [expunge.erase(model, one, UCE(num_retain_words=20)) for one in (problem, other)]


@pytest.fixture
def report(model, edits, suite, tmp_path):
    return evaluate(model, edits, [suite], cache=Cache(tmp_path / "cache"))


def test_images_are_drawn_once_for_all(model, edits, suite, report, tmp_path):
    # 3 erased, 2 of the synonym, 2 retained ("bird" is unknown to the judge); for three models.
    assert report.cache.drawn == 3 * 7
    again = evaluate(
        model, edits, [suite], metrics=["structure", "kid"], cache=Cache(tmp_path / "cache")
    )
    assert again.cache.drawn == 0
    assert again.cases[0].rows[1].h.value == report.cases[0].rows[1].h.value > 0
    assert report.cases[0].left_out == ()
    assert "structure" in again.cases[0].rows[1].metrics
    assert "structure" not in report.cases[0].rows[1].metrics
    (case,) = report.cases
    assert (case.erased, case.retained) == (("airplane",), ("ship",))
    assert [row.name for row in case.rows] == ["original", "uce: airplane", "uce: airplane (2)"]


def test_alignment_lies_between_its_floor_and_its_ceiling(model, edits, suite, tmp_path):
    """Against the kernel distance of images drawn and compared by hand."""
    from expunge.evaluation.image_source import Request, Source
    from expunge.evaluation.measure import make_metric

    cache = Cache(tmp_path / "cache")
    report = evaluate(model, edits, [suite], metrics=["alignment"], cache=cache)
    assert report.cache.drawn == 3 * 7 + 2 * 6  # "sky" and "street", each twice three images
    (case,) = report.cases
    metric = make_metric("alignment", {"model": "emoji"})

    def rows(source, prompt, seeds):
        asked = [Request(prompt, seed, 2, model.guidance_scale) for seed in seeds]
        return metric.measure(cache.draw(source, asked), [prompt] * len(asked))

    original = Source(model)
    for row, edit, anchor in zip(case.rows[1:], edits, ("sky", "street"), strict=True):
        further = rows(original, f"a photo of the {anchor}", (3, 4, 5))
        expected = {
            "erased": rows(Source(model, (edit,)), "a photo of the airplane", (0, 1, 2)),
            "floor": rows(original, f"a photo of the {anchor}", (0, 1, 2)),
            "ceiling": rows(original, "a photo of the airplane", (0, 1, 2)),
        }
        found = row.metrics["alignment"]
        assert found.keys() == expected.keys()
        for name, images in expected.items():
            value = metric.distance(images, further).value
            assert found[name].value == pytest.approx(value, rel=1e-6)
            assert found[name].score.low <= value <= found[name].score.high
    assert "alignment" not in case.rows[0].metrics


def test_anchors_are_drawn_once_and_the_suite_may_say_which(suite):
    both = suite.anchor_cells(["airplane", "ship"], {"airplane": "sky", "ship": "sky"})
    assert [(c.role, c.prompt, len(c.seeds)) for c in both] == [("anchor", "a photo of the sky", 12)]
    (empty,) = suite.anchor_cells(["airplane"], {"airplane": ""})
    assert (empty.prompt, len(empty.seeds)) == ("", 6)
    assert suite.anchor_cells(["airplane"], {}) == ()  # a model of its own: nobody knows its anchor
    fixed = dataclasses.replace(suite, anchor="art")
    assert fixed.anchor_cells(["airplane"], {"airplane": "sky"})[0].prompt == "a photo of the art"


def test_files_are_whole_and_say_where_numbers_come_from(report, edits, tmp_path):
    report.save(tmp_path / "report")
    table = json.loads((tmp_path / "report" / "results.json").read_text())
    assert table["format"] == 3
    facts = table["provenance"]
    assert facts["num_inference_steps"] == 2
    assert len(facts["model sha256"]) == 64
    assert facts["sampler"]["class"] == "DDIMScheduler"
    assert facts["metrics"]["clip_zeroshot"]["classes"] == ["airplane", "ship"]
    assert facts["versions"]["torch"]
    (case,) = table["cases"]
    assert case["rows"][1]["from"]["hash"] == edits[0].hash
    assert case["rows"][1]["from"]["problem"]["erase"][0]["name"] == "airplane"
    assert set(case["rows"][1]["terms"]) >= {"efficacy", "specificity"}
    assert case["rows"][1]["metrics"]["clip_score"]["retained"]["n"] == 2
    assert case["rows"][1]["published"].keys() == {"Acc_e", "Acc_s"}
    frechet = case["rows"][1]["metrics"]["frechet"]["erased"]
    assert frechet["low"] <= frechet["value"] <= frechet["high"]
    assert "pixel_distance" not in case["rows"][0]["metrics"]
    with (tmp_path / "report" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["edit"] for line in lines] == [row["name"] for row in case["rows"]]
    assert float(lines[1]["efficacy"]) == pytest.approx(
        case["rows"][1]["terms"]["efficacy"]["value"], abs=1e-5
    )
    assert "NaN" not in (tmp_path / "report" / "results.json").read_text()
    numbers = {one["of"]: one for one in case["differences"]}
    assert numbers.keys() >= {"H_c", "efficacy", "specificity"}
    assert {one["comparisons"] for one in numbers.values()} == {1}
    assert all(one["p"] <= one["p corrected"] for one in numbers.values())
    assert "Holm" in facts["comparisons"]


def test_the_folder_of_another_suite_is_left_alone(report, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"cases": [{"suite": {"name": "style"}}]}))
    with pytest.raises(ExpungeError, match="holds results of the suite style"):
        report.save(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ExpungeError, match="not ours to replace"):
        report.save(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_erased_folders_are_judged_like_edits(model, edits, suite, tmp_path):
    with edits[0].apply(model):
        model.pipe.save_pretrained(tmp_path / "erased")
    folder = Candidate("folder", ("airplane",), model=expunge.load(tmp_path / "erased"))
    report = evaluate(model, [edits[0], folder], [suite], cache=Cache(tmp_path / "cache"))
    edit, copy = report.cases[0].rows[1:]
    assert copy.metrics["clip_score"]["erased"].value == pytest.approx(
        edit.metrics["clip_score"]["erased"].value, abs=0.05
    )


def test_what_cannot_be_judged_is_said(model, edits, suite, tmp_path):
    cache = Cache(tmp_path)
    guitar = expunge.erase(model, Problem((Concept("guitar", "sky"),)), "uce")
    for arguments, says in (
        (([guitar], [suite]), "suite tiny knows nothing of 'guitar'; it knows airplane, ship"),
        (([], [suite]), "no edit to judge"),
        ((edits, []), "no suite to judge by"),
        ((edits, [suite, suite]), "named twice"),
    ):
        with pytest.raises(ExpungeError, match=says):
            evaluate(model, *arguments, cache=cache)
    with pytest.raises(ExpungeError, match="did you mean 'structure'"):
        evaluate(model, edits, [suite], metrics=["strukture"], cache=cache)
    odd = dataclasses.replace(suite, judge="clip_score")
    with pytest.raises(ExpungeError, match="does not say what an image shows"):
        evaluate(model, edits, [odd], cache=cache)
    assert cache.drawn == 0


def test_a_prompt_that_is_cut_is_said_with_the_place(model, suite, tmp_path):
    from expunge.evaluation.measure import warn_of_cuts

    long = dataclasses.replace(suite, templates={"erased": ("a photo of " + "ship " * 80 + "{}",)})
    with pytest.warns(ExpungeWarning, match="it will be cut after … 'ship ship ship'"):
        warn_of_cuts(model, long.cells(["airplane"]))


def test_broken_models_erase_nothing(model, suite, tmp_path):
    """Images that are no numbers, and blank ones: unrecognisable, never erased."""
    import torch

    from conftest import tiny_pipeline

    def broken(value):
        pipe = tiny_pipeline()
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight.fill_(0)
            pipe.vae.decoder.conv_out.bias.fill_(value)
        return expunge.load(pipe)

    candidates = [
        Candidate(name, ("airplane",), model=broken(value))
        for name, value in (("nan", float("nan")), ("blank", 0.0))
    ]
    report = evaluate(model, candidates, [suite], cache=Cache(tmp_path / "cache"))
    for row in report.cases[0].rows[1:]:
        assert row.terms["efficacy"].value == row.terms["specificity"].value == row.h.value == 0
        assert row.roles["erased"]["unrecognisable"].value == 1
    report.save(tmp_path / "report")
    assert "NaN" not in (tmp_path / "report" / "results.json").read_text()


def test_a_judge_without_weights_is_said_before_anything_is_drawn(model, edits, tmp_path):
    table = {k: v for k, v in TABLE.items() if k not in ("judge", "question", "options", "metrics")}
    table |= {"options": {"detector": {"folder": str(tmp_path / "absent")}}}
    cache = Cache(tmp_path / "cache")
    with pytest.raises(ExpungeError, match=r"cannot read .*absent/model\.safetensors: No such file"):
        evaluate(model, edits, [Suite.from_table(table, "own")], cache=cache)
    assert cache.drawn == 0


def test_a_full_disk_is_one_sentence_and_leaves_the_report_as_it_was(report, tmp_path):
    """The system refuses to make any file longer than a few bytes."""
    import resource

    report.save(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(ExpungeError, match="cannot write .*: File too large"):
            report.save(tmp_path / "report")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_left_out_words_are_in_no_strip_and_all_retained_words_are(model, edits, suite, tmp_path):
    from expunge.evaluation.html_strips import SHOWN, worst_first

    report = evaluate(model, edits[:1], [suite], cache=Cache(tmp_path / "cache"))
    (case,) = report.cases
    row = case.rows[1]
    places = [c for c, cell in enumerate(row.samples) if cell.cell.role == "retained"]
    found = worst_first(case, row, "retained")
    assert {c for _, c, _ in found[: SHOWN["retained"]]} == set(places)
    words = row.samples[places[0]].cell.targets[0].words
    case = dataclasses.replace(case, left_out=(("retained", words, 0.0),))
    assert places[0] not in {c for _, c, _ in worst_first(case, row, "retained")}


def test_scores_alone_give_h_a(model, edits, tmp_path):
    table = {k: v for k, v in TABLE.items() if k not in ("judge", "question", "options", "metrics")}
    style = Suite.from_table({**table, "score": "H_a", "judge": "clip_score"}, "artists")
    report = evaluate(model, edits[:1], [style], cache=Cache(tmp_path))
    row = report.cases[0].rows[1]
    assert row.h.value == pytest.approx(row.terms["retained"].value - row.terms["erased"].value)
    report.save(tmp_path / "report")


def browse(page, *arguments):
    """The page as headless Chromium sees it; skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium here to look at the page with")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={page.parent / 'profile'}",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--v=0",
        *arguments,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_the_page_in_a_browser(report, tmp_path):
    report.save(tmp_path)
    page = tmp_path / "index.html"
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    probe = """<script>
    const images = [...document.images];
    images.forEach(i => i.loading = "eager");
    const table = document.querySelectorAll("table.sortable")[1];  // further metrics: all differ
    const button = table.querySelectorAll("thead button")[2];
    const column = () => [...table.tBodies[0].rows]
      .map(r => Number(r.cells[2].dataset.sort));
    button.click(); const down = column(); button.click(); const up = column();
    Promise.all(images.map(i => i.decode().then(() => 1, () => 0))).then(loaded => {
      document.body.dataset.found = JSON.stringify({
        images: images.length, loaded: loaded.reduce((a, b) => a + b, 0), down, up,
        wide: document.documentElement.scrollWidth > innerWidth,
        asked: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
      });
    });
    </script>"""
    watched = tmp_path / "watched.html"
    watched.write_text(text.replace("</body>", probe + "</body>"))
    for width in (390, 1200):
        for _ in range(3):  # images are decoded in real time, and the browser's time is not
            result = browse(watched, f"--window-size={width},900", "--dump-dom")
            if said := re.search(r'data-found="([^"]*)"', result.stdout):
                break
        found = json.loads(said[1].replace("&quot;", '"'))
        assert found["images"] == found["loaded"] > 10
        assert len(set(found["up"])) == 3
        assert found["down"] == sorted(found["down"], reverse=True)
        assert found["up"] == sorted(found["up"])
        assert (found["wide"], found["asked"]) == (False, 0)
        assert "CONSOLE" not in result.stderr


EXPERIMENT = """model = "tiny"
suites = ["own.toml"]
concepts = ["airplane=sky", "ship=street"]
seeds = [0]
[[methods]]
name = "uce"
num_retain_words = 20
[[methods]]
name = "uce"
num_retain_words = 20
ridge = 5.0
"""
MACE_ROWS = """
[[methods]]
name = "mace"
preset = "emoji"
stages = ["refine"]
title = "refinement only"
[[methods]]
name = "mace"
preset = "emoji"
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "own.toml").write_text(SUITE_TEXT)
    (tmp_path / "table.toml").write_text(EXPERIMENT)
    return tmp_path / "table.toml"


def test_an_experiment_is_done_once(model, experiment, tmp_path, monkeypatch):
    read = Experiment.read(experiment)
    assert len(read.jobs()) == 2 * 2
    assert read.problems[0].retain == ("ship",)
    cache = Cache(tmp_path / "cache")
    report = read.run(model, tmp_path / "out", cache=cache)
    assert len(list((tmp_path / "out" / "edits").iterdir())) == 4
    assert [len(case.rows) for case in report.cases] == [3, 3]
    means = report.average_methods()["own"]
    assert len(means) == 3  # the original and two recipes
    ((suite, one, other, difference),) = report.pair_methods()
    assert suite == "own"
    assert difference.value == means[one].value - means[other].value
    assert torch.equal(difference.draws, means[one].draws - means[other].draws)  # paired
    fewer = [dataclasses.replace(report.cases[0], rows=report.cases[0].rows[:2]), report.cases[1]]
    assert not dataclasses.replace(report, cases=tuple(fewer)).pair_methods()
    monkeypatch.setattr("expunge.evaluation.experiment.erase", None)  # nothing is left to erase
    table = report.to_dict()["differences between methods"]
    assert [one["comparisons"] for one in table] == [1]
    assert table[0].keys() >= {"general low", "p corrected", "larger than chance in general"}
    drawn = cache.drawn
    again = read.run(model, tmp_path / "out", cache=cache)
    assert cache.drawn == drawn
    assert again.to_dict() == report.to_dict()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "averaged over what was erased" in page
    assert "for concepts in general" in page
    assert "1 comparison, corrected for their number" in page
    assert "counting the 2 comparisons of" in page  # one in each of two cases
    for ridge in (5.0, UCE().ridge):  # what two recipes have in common is not said
        assert f">uce (ridge {ridge}):" in page


def test_seeds_of_the_edit_at_full_size(experiment):
    experiment.write_text("full_seeds = [4, 5]\n" + EXPERIMENT)
    read = Experiment.read(experiment)
    assert {job.seed for job in read.jobs()} == {0}
    assert {job.seed for job in dataclasses.replace(read, full=True).jobs()} == {4, 5}
    experiment.write_text(EXPERIMENT.replace("seeds = [0]", "seeds = [4, 5]"))
    read = Experiment.read(experiment)
    assert [job.seed for job in read.jobs()] == [
        job.seed for job in dataclasses.replace(read, full=True).jobs()
    ]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("concepts", "concept", "an experiment has no field 'concept'"),
        ("suites", "suite", "an experiment has no field 'suite'; did you mean 'suites'"),
        (
            "num_retain_words",
            "num_words",
            "uce has no field 'num_words'; did you mean 'num_retain_words'",
        ),
    ],
)
def test_a_misspelt_field_is_told_in_the_readers_words(experiment, before, after, said):
    experiment.write_text(EXPERIMENT.replace(before, after, 1))
    with pytest.raises(ExpungeError, match=said):
        Experiment.read(experiment)


def test_presets_and_titles(experiment):
    experiment.write_text(EXPERIMENT + MACE_ROWS)
    *_, refined, _, whole, _ = Experiment.read(experiment).jobs()
    assert (refined.method.stages, refined.method.max_train_steps) == (("refine",), 50)
    assert refined.name == "refinement only: airplane"
    assert whole.name == "mace emoji: airplane"
    assert Experiment.read(experiment).jobs()[0].name == "uce, num_retain_words 20: airplane"


def test_the_experiments_of_this_repository_can_be_read():
    folder = Path(__file__).parents[1] / "experiments"
    tuning = set(folder.glob("tune/*.toml"))
    tables = [Experiment.read(path) for path in set(folder.glob("*/*.toml")) - tuning]
    assert len(tables) >= 20
    # A table at full size is of several seeds of every edit.
    for read in tables:
        full = dataclasses.replace(read, full=True).jobs()
        assert len({job.seed for job in full}) >= 3
        assert len(full) == 3 * len(read.jobs())
    assert all(len(read.jobs()) == len({job.name for job in read.jobs()}) for read in tables)
    # What values were chosen on is judged nowhere else, but for the style that says so.
    for model, but in (("emoji", {"noto", "twemoji", "fluent", "emojione"}), ("miniature", set())):
        suites = [suite for read in tables for suite in read.suites if suite.model == model]
        judged = {c.name for suite in suites for c in (*suite.concepts, *suite.others)}
        chosen = {
            c.name for path in tuning if (s := Suite.read(path)).model == model for c in s.concepts
        }
        assert len(chosen) > 30
        assert chosen & judged == but


def test_fields_beside_a_preset(experiment):
    table = 'name = "mace"\npreset = "emoji"\n'
    experiment.write_text(
        EXPERIMENT.replace('name = "uce"\n', table, 1).replace("num_retain_words", "max_train_steps", 1)
    )
    first, _, other, _ = Experiment.read(experiment).jobs()
    assert first.method == type(first.method).preset("emoji", max_train_steps=20)
    assert first.name == "mace emoji, max_train_steps 20: airplane"
    assert other.name.startswith("uce, ridge 5.0, num_retain_words 20")
    experiment.write_text(EXPERIMENT.replace('"uce"', '"mace"\npreset = "emojo"', 1))
    with pytest.raises(ExpungeError, match="did you mean 'emoji'"):
        Experiment.read(experiment)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"uce"\nnum_retain_words', '"uec"\ngeneral', "did you mean 'uce'"),
        ("ridge = 5.0", 'preset = "fats"', "there is no preset 'fats'"),
        ("ridge", "rigde", "did you mean 'ridge'"),
        ("ridge = 5.0", "ridge = -5.0", "ridge must be above 0"),
        ("suites", "suits", "did you mean 'suites'"),
        ('["own.toml"]', '["absent.toml"]', "cannot read"),
        ('["own.toml"]', "[]", "names no suite"),
        ("seeds = [0]", 'attacks = ["embeding"]', "did you mean 'embedding'"),
        ("seeds = [0]", 'attacks = ["embedding:far"]', "no budgets for the attack embedding:far"),
        ('"ship=street"', '"guitar"', "knows nothing of 'guitar'"),
        ('["airplane=sky", "ship=street"]', "[]", "has no concepts"),
        ("seeds = [0]", "seeds = []", "has no seeds"),
        ("seeds", 'kind = "thing"\nseeds', "kind must be"),
        ("seeds", "retain = 3\nseeds", 'retain is "others"'),
    ],
)
def test_what_is_wrong_with_an_experiment(experiment, old, new, says):
    experiment.write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(ExpungeError) as caught:
        Experiment.read(experiment)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_notebook_shows_of_a_report(model, edits, suite, tmp_path):
    named = [Candidate.of(edits[0], "<b>mine</b>")]
    report = evaluate(model, named, [suite], cache=Cache(tmp_path / "cache"))
    html = report._repr_html_()
    assert "<caption>tiny, quick</caption>" in html
    assert re.findall('<th scope="col">(.*?)</th>', html) == [
        "edit",
        "erased",
        "H_c",
        *report.cases[0].rows[0].terms,
    ]
    assert re.findall('<th scope="row">(.*?)</th>', html) == ["original", "&lt;b&gt;mine&lt;/b&gt;"]
    score = report.cases[0].rows[1].h.score
    assert f"<td>{100 * score.value:.1f} ({100 * score.low:.1f}–{100 * score.high:.1f})</td>" in html
    assert not re.search("<b>|https?:|src=", html)
