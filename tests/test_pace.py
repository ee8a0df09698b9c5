"""Time told honestly: what is counted, and what is told of the rest."""

import dataclasses

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.base import registry
from expunge.checkpoints.cost_estimate import CostEstimate, estimate_model
from expunge.checkpoints.pace import Pace, format_duration, make_printer, time_model
from expunge.erasing.caption_gram import compute_prior, count_unread, read_captions
from expunge.runtime.cost import Cost


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


FAST = {
    "mace": {"max_train_steps": 3, "num_images": 2, "num_inference_steps": 3, "captions": "{captions}",
             "learning_rate": 0.01,
             "refine_prior": 1.0, "fuse_prior": 1.0, "domain_weight": 1.0, "masks": "attention"},
    "ace": {"num_retain_words": 20, "num_images": 1, "num_inference_steps": 2, "rounds": 2,
            "max_train_steps": 2, "attack_steps": 2, "recovery_threshold": 0.0, "max_overlap": 1.0},
    "uce": {"num_retain_words": 20},
    "esd": {"max_train_steps": 8, "trajectory_steps": 6, "unconditional": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_what_is_counted_is_what_was_foretold(model, tmp_path, name):
    """Prompts, a prior's captions among them, predictions and gradients: of every stage."""
    told = tmp_path / "captions.txt"
    told.write_text("\n".join(f"a {name} no. {i}" for i in range(30)), encoding="utf-8")
    fields = {k: str(told) if v == "{captions}" else v for k, v in FAST[name].items()}
    method = registry.get("methods", name)(**fields)
    problem = Problem((Concept("airplane", "sky", synonyms=("jet",)),), ("ship",))
    work = method.estimate_cost(problem, model.num_inference_steps)
    foretold = estimate_model(model, work=work).count_units(work)
    assert (foretold["prompts"] - work.prompts) == (30 if name == "mace" else 0)
    with Pace(model, {}, {}) as pace:
        expunge.erase(model, problem, method)
    for kind, one in pace.kinds.items():
        # A trajectory of ESD ends anywhere; a prompt that is there twice is read once.
        within = 0.35 if name == "esd" else 0.15
        assert one.done == pytest.approx(foretold[kind], rel=within, abs=14), kind


def test_ace_counts_its_attention(model):
    method = registry.get("methods", "ace")(
        stages=("gate",), reduction="attention", num_retain_words=5, num_images=1, num_inference_steps=2,
        templates=("a photo of the {}",),
    )  # fmt: skip
    problem = Problem((Concept("airplane", "sky"), Concept("ship", "sky")))
    with Pace(model, {}, {}) as pace:
        expunge.erase(model, problem, method)
    assert pace.kinds["predictions"].done == method.estimate_cost(problem, 50).predictions


def test_a_prior_that_was_kept_is_not_read_again(model, monkeypatch, tmp_path):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    source = tmp_path / "c.txt"
    source.write_text("a ship\na cat\na dog", encoding="utf-8")
    assert count_unread(None, str(source)) == count_unread(model, str(source)) == 3
    compute_prior(model, read_captions(str(source)))
    assert count_unread(model, str(source)) == 0
    assert count_unread(model, "") == 0
    # A data set is not fetched to be counted.
    assert count_unread(model, "owner/name:column") == 0
    assert count_unread(None, "general") == len(read_captions("general"))


def estimate(**fields):
    made = CostEstimate({"denoiser": 1}, 4, (("denoiser",),), prompt_seconds=0.1, prediction_seconds=1.0)
    return dataclasses.replace(made, **fields)


def test_every_stage_is_in_the_estimate():
    work = Cost(prompts=10, predictions=20, gradients=5, captions="general", products=7)
    each = estimate(gradient_seconds=2.5, product_seconds=0.01, captions=100, saving_seconds=0.5)
    expected = (10 + 100) * 0.1 + 20 * 1.0 + 5 * 2.5 + 7 * 0.01 + 0.5
    assert each.seconds(work) == pytest.approx(expected)
    assert estimate(captions=0).seconds(work) == pytest.approx(1 + 20 + 5 * 3)
    assert estimate().count_units(work)["prompts"] == 10 + len(read_captions("general"))


@pytest.fixture
def timed(model):
    """A pace with a clock of its own: 100 prompts at 0.1 s and 10 predictions at 1 s were foretold."""
    clock = Clock()
    totals = {"prompts": 100, "predictions": 10, "gradients": 0}
    foretold = {"prompts": 0.1, "predictions": 1.0, "gradients": 3.0}
    return Pace(model, totals, foretold, overhead=4.0, clock=clock), clock


def test_the_rest_is_told_from_what_was_measured(timed):
    pace, clock = timed
    model = pace.model
    assert pace.left() == pytest.approx(100 * 0.1 + 10 * 1 + 4)
    assert pace.done == 0
    heard = []
    pace.listeners.append(lambda left, done: heard.append((left, done)))
    with pace:
        for start in range(0, 60, 10):
            model.encode([f"ship {i}" for i in range(start, start + 10)])
            clock.now += 3.0  # ten prompts: three times as long as foretold
    # What has not been met yet is expected to take three times as long, too.
    assert pace.kinds["prompts"].measured == pytest.approx(0.3)
    assert pace.left() == pytest.approx(40 * 0.3 + 10 * 3 + 4 * 3)
    assert pace.done == pytest.approx(60 * 0.3 / (60 * 0.3 + 54))
    assert [done for _, done in heard] == sorted(done for _, done in heard)
    # Outside the block nothing is counted.
    model.encode(["a cat"])
    assert pace.kinds["prompts"].done == 60


def test_predictions_with_and_without_gradients_are_told_apart(timed):
    pace, _ = timed
    model = pace.model
    text, latents = model.encode(["ship"] * 3), torch.zeros(3, 4, 8, 8)
    with pace:
        with torch.no_grad():
            model.predict(latents, 5, text)
        with torch.enable_grad():
            model.predict(latents[:2], 5, text[[0, 1]])
    assert (pace.kinds["predictions"].done, pace.kinds["gradients"].done) == (3, 2)


def test_a_closed_form_in_between_is_no_prompts_pace(timed):
    pace, clock = timed
    with pace:
        for start in range(0, 50, 10):
            pace.model.encode([f"ship {i}" for i in range(start, start + 10)])
            clock.now += 100.0 if start == 20 else 1.0
        pace.model.encode(["cat"])
    assert pace.kinds["prompts"].measured < 0.5


def test_what_an_earlier_command_has_done_is_not_expected_again(timed):
    pace, _ = timed
    told = []
    pace.tell = lambda *one: told.append(one)
    pace.kinds["gradients"].total = 8
    pace.progress("training", 3, 4)
    assert told == [("training", 3, 4)]
    assert pace.kinds["predictions"].total == pytest.approx(2.5)
    assert pace.kinds["gradients"].total == pytest.approx(2)


def test_hardening_that_ends_early_is_expected_to_end_early_again(timed):
    pace, _ = timed
    pace.kinds["gradients"].total = 80
    pace.progress("hardening", 0, 4)
    pace.kinds["gradients"].done, pace.kinds["predictions"].done = 5, 2
    pace.progress("hardening", 1, 4)
    assert pace.kinds["gradients"].total == 20
    assert pace.kinds["predictions"].total == 8


def test_lines_come_after_some_seconds_and_now_and_then(timed):
    pace, clock = timed
    told = []
    tell = make_printer(pace, told.append, first=3, every=30, clock=clock)
    pace.label, pace.share = "training", 0.25
    for second in range(40):
        clock.now = float(second)
        tell(100.0 - second, second / 100)
    assert told == [
        "training, 25 %; about 2 min left in all, 3 % done",
        "training, 25 %; about 67 s left in all, 33 % done",
    ]
    with pytest.raises(ExpungeError, match="must be above 0, not 0 and 1"):
        make_printer(pace, told.append, 0, 1)
    assert (format_duration(0.01), format_duration(59.6), format_duration(5400)) == (
        "1 s",
        "60 s",
        "1.5 h",
    )


def test_a_trial_leaves_the_model_as_it_was(model):
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    found = time_model(model, batch_size=2)
    assert set(found) == {"prompts", "predictions", "gradients"}
    assert all(seconds > 0 for seconds in found.values())
    assert all(torch.equal(before[k], v) for k, v in model.network.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_a_dear_trial_is_left_out(model, monkeypatch):
    monkeypatch.setattr(
        "expunge.checkpoints.cost_estimate.time_model", lambda model: pytest.fail("timed for nothing")
    )
    monkeypatch.setattr("expunge.checkpoints.cost_estimate._time_device", lambda device, dtype: 1e3)
    made = estimate_model(model, work=Cost(prompts=1, predictions=1))
    assert made.prediction_seconds > 1
