"""What every attack keeps, over the registry; then what each one finds; then how it is judged."""

import dataclasses
import json
from contextlib import contextmanager
from typing import ClassVar
from unittest import mock

import pytest
import torch

import expunge
from conftest import weights
from expunge import Concept, Edit, ExpungeError, Probe, Problem
from expunge.attack import Attack
from expunge.attacks.embedding import Embedding
from expunge.attacks.inversion import Inversion, replace_name
from expunge.base import registry
from expunge.changes import Gated
from expunge.cli.main import main
from expunge.erasing.word_search import WordSpace, rank_swaps
from expunge.evaluation.attack_budgets import choose_ladders, read_ladder
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.evaluate import evaluate
from expunge.evaluation.html_conditions import say_verdict
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Request, Source
from expunge.evaluation.results import read_results
from expunge.evaluation.suite import Suite
from expunge.methods.ace import ACE
from expunge.methods.uce import UCE
from expunge.metric import Classifier
from expunge.runtime.context import RunContext
from tiny import flux

ATTACKS = registry.list_names("attacks")
PROBE = Probe.of("a photo of the airplane", n=2, num_inference_steps=3)


@pytest.fixture
def edit(model, problem):
    # In the probe's own phrasing: of thirty, a random encoder leaves gates so steep that they are flat.
    return expunge.erase(model, problem, ACE.preset("gate", templates=("a photo of the {}",)))


@pytest.fixture
def swapped(model):
    """A tiny edit at the level of prompts: before the words of one prompt gates put those of another."""
    text = model.encode(["a photo of the airplane", "a photo of the ground"])
    e, n = text.embeddings
    scale = float(e.norm(dim=1).mean() ** 2)
    layers = tuple(entry.layer for entry in model.text_entries())
    differing = (e - n).norm(dim=1) > 1e-3
    e, n = e[differing][:8], n[differing][:8]
    change = Gated(
        layers, e, 0.9 * e.square().sum(1), torch.full((len(e),), 100 / scale),
        up=(e - n).T, down=(e / e.square().sum(1, keepdim=True)), goal=torch.zeros(len(e)),
        owner=torch.arange(len(e)),
    )  # fmt: skip
    problem = Problem((Concept("airplane", "ground"),))
    made = expunge.erase(model, problem, ACE.preset("gate"))
    return dataclasses.replace(made, changes=(change,))


def test_the_folder_is_the_list():
    assert {"embedding", "inversion"} <= set(ATTACKS)


@pytest.fixture(params=ATTACKS)
def attack(request):
    few = {
        "embedding": {"steps": 4, "num_timesteps": 1},
        "inversion": {"steps": 2, "num_images": 1, "batch_size": 1},
        "token_search": {"queries": 5, "num_points": 1, "batch_size": 2, "num_words": 1},
        "encoder_search": {"queries": 7, "batch_size": 2, "num_words": 1},
        "query_search": {"queries": 4, "batch_size": 2, "num_words": 1, "population": 2},
        "ddim_inversion": {"steps": 3},
        "foreign_lora": {"max_train_steps": 2, "num_images": 2, "learning_rate": 1e-2},
        "finetuning": {"max_train_steps": 2, "num_images": 2, "batch_size": 2, "learning_rate": 1e-2},
    }
    return registry.get("attacks", request.param)(**few.get(request.param, {}))


def draw_under(model, edit, attack, seed=0):
    """The images of the probe under an attack, whatever it changes."""
    probe = attack.run(model, edit, PROBE, RunContext(seed))
    with attack.apply(model, edit, RunContext(seed)) as changed, torch.no_grad():
        return changed.draw(probe)


class TestContract:
    def test_says_what_it_is(self, attack):
        assert "Source:" in type(attack).__doc__
        assert registry.describe("attacks", registry.name_of("attacks", type(attack)))
        with pytest.raises(dataclasses.FrozenInstanceError):
            attack.renamed = {}

    def test_its_ladders_are_budgets_of_its_own(self, attack):
        name = registry.name_of("attacks", type(attack))
        bare = Suite.from_table({**TABLE, "attacks": {}}, "told")
        for rung in type(attack).ladders or ("",):
            ladder = read_ladder(bare, f"{name}:{rung}" if rung else name)
            assert all(isinstance(one, type(attack)) for one in ladder.rungs.values())
            assert len(set(ladder.rungs.values())) == len(ladder.rungs) >= 1

    def test_leaves_the_model_as_it_was(self, model, edit, attack):
        before, asking = weights(model.pipe), [p.requires_grad for p in model.parameters()]
        draw_under(model, edit, attack)
        with pytest.raises(KeyError), attack.apply(model, edit, RunContext()):
            raise KeyError  # whatever goes wrong while it draws
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        assert asking == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())

    def test_no_budget_changes_nothing(self, model, edit, attack):
        budget = next((f for f in ("steps", "queries", "max_train_steps") if hasattr(attack, f)), "")
        if budget not in ("steps", "queries"):
            pytest.skip("it has no budget that may be 0, or it changes the model")
        idle = dataclasses.replace(attack, **{budget: 0})
        assert idle.changes_nothing
        assert idle.run(model, edit, PROBE, RunContext()) == PROBE
        with model.using(edit):
            assert torch.equal(draw_under(model, Edit((), edit.record), idle), model.draw(PROBE))

    def test_same_seed_same_images_and_they_are_others(self, model, edit, attack):
        probe = attack.run(model, edit, PROBE, RunContext(3))
        assert len(probe) == len(PROBE)
        assert probe.text is None or not probe.text.embeddings.requires_grad
        first, second = (draw_under(model, edit, attack, 3) for _ in range(2))
        assert torch.equal(first, second)
        with model.using(edit):
            assert not torch.equal(first, model.draw(PROBE))

    def test_is_made_anew_for_each_edit(self, model, problem, attack):
        # Acts on every word, where gates may be shut, and on the probe's own phrasing.
        edit = expunge.erase(model, problem, UCE(templates=("a photo of the {}",)))
        other = dataclasses.replace(edit, changes=())
        first, second = (attack.run(model, one, PROBE, RunContext()) for one in (edit, other))
        if first.text is not None:
            assert not torch.equal(first.text.embeddings, second.text.embeddings)
        assert not torch.equal(*(draw_under(model, one, attack) for one in (edit, other)))

    def test_bad_input_is_one_sentence(self, attack):
        for field in dataclasses.fields(attack):
            with pytest.raises(ExpungeError, match=f"^{field.name} must be ") as caught:
                type(attack)(**{field.name: object()})
            assert "\n" not in str(caught.value)


class TestEmbedding:
    def lack(self, model, edit, attack, probe):
        """The attack's objective on its result, or on the plain prompt."""
        text, rows = model.encode(PROBE.prompts), [0, 1]
        points = attack.points(model, text, PROBE, rows)
        given = (probe.text or text).embeddings
        with model.using(edit), torch.no_grad():
            return attack.objective(model, text, given, points)

    def test_brings_the_original_back_the_better_the_larger_its_budget(self, model, swapped):
        attack = Embedding(radius=0.5)
        found = [
            PROBE,
            *(
                dataclasses.replace(attack, steps=n).run(model, swapped, PROBE, RunContext())
                for n in (1, 4, 12)
            ),
        ]
        lacks = torch.stack([self.lack(model, swapped, attack, probe) for probe in found])
        assert bool((lacks.diff(dim=0) <= 0).all())
        assert bool((lacks[-1] < 0.5 * lacks[0]).all())
        before = model.draw(PROBE)
        with model.using(swapped):
            far, near = ((model.draw(p) - before).square().mean() for p in (found[0], found[-1]))
        assert near < far

    def test_stays_in_its_balls(self, model, edit):
        text = model.encode(PROBE.prompts).embeddings
        found = Embedding(radius=0.05, steps=3).run(model, edit, PROBE, RunContext()).text.embeddings
        assert bool(((found - text).norm(dim=-1) <= 0.05 * text.norm(dim=-1) * (1 + 1e-4)).all())
        assert bool(((found - text).norm(dim=-1) > 0).any())

    @pytest.mark.parametrize("restarts", [1, 2])
    def test_rows_know_nothing_of_one_another(self, model, edit, restarts):
        one, two = (
            Embedding(steps=2, batch_size=batch, restarts=restarts)
            .run(model, edit, PROBE, RunContext())
            .text.embeddings
            for batch in (1, 2)
        )
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)

    def test_restarts_never_do_worse_and_stay_in_the_ball(self, model, swapped):
        attack = Embedding(radius=0.5, steps=1)
        found = [
            dataclasses.replace(attack, restarts=n).run(model, swapped, PROBE, RunContext())
            for n in (1, 3)
        ]
        lacks = torch.stack([self.lack(model, swapped, attack, probe) for probe in found])
        assert bool((lacks.diff(dim=0) <= 1e-6).all())
        assert bool((lacks[-1] < lacks[0] - 1e-6).any())  # one step from somewhere else got further
        text = model.encode(PROBE.prompts).embeddings
        for probe in found:
            away = (probe.text.embeddings - text).norm(dim=-1)
            assert bool((away <= 0.5 * text.norm(dim=-1) * (1 + 1e-4)).all())
        again = dataclasses.replace(attack, restarts=3).run(model, swapped, PROBE, RunContext())
        assert torch.equal(again.text.embeddings, found[-1].text.embeddings)


class TestInversion:
    def test_a_word_is_learnt_that_calls_the_erased_back(self, model, problem):
        edit = expunge.erase(model, problem, "uce")
        attack = Inversion(steps=60, num_images=2, learning_rate=0.1)
        assert attack._word(model, edit) == "sky"
        before, plain = (
            model.draw(PROBE),
            model.encode([replace_name(p, edit, "sky") for p in PROBE.prompts]),
        )
        found = attack.run(model, edit, PROBE, RunContext())
        with model.using(edit):
            far = (model.draw(dataclasses.replace(PROBE, text=plain)) - before).square().mean()
            near = (model.draw(found) - before).square().mean()
        assert near < far

    def test_the_best_of_several_words_counts(self, model, problem, monkeypatch):
        edit = expunge.erase(model, problem, "uce")
        attack = Inversion(steps=4, num_images=2, learning_rate=0.1, restarts=3)
        told = {}
        errors = Inversion._errors

        def spy(self, *given):
            told["errors"], told["learnt"] = errors(self, *given), given[-1]
            return told["errors"]

        monkeypatch.setattr(Inversion, "_errors", spy)
        found = attack.run(model, edit, PROBE, RunContext())
        assert len({round(e, 9) for e in told["errors"]}) == 3  # three words of their own
        best = told["learnt"][told["errors"].index(min(told["errors"]))]
        prompts = [replace_name(p, edit, "sky") for p in PROBE.prompts]
        text = model.encode_with(prompts, "sky", best)
        torch.testing.assert_close(found.text.embeddings, text.embeddings)
        # The first is the one that there would be alone.
        alone = dataclasses.replace(attack, restarts=1).run(model, edit, PROBE, RunContext())
        first = model.encode_with(prompts, "sky", told["learnt"][0])
        torch.testing.assert_close(alone.text.embeddings, first.embeddings)

    def test_vectors_take_the_place_of_one_word(self, model):
        (own,) = model.word_vectors("sky")
        same = model.encode_with(["the sky", "the ship"], "sky", [own])
        torch.testing.assert_close(same.embeddings, model.encode(["the sky", "the ship"]).embeddings)
        vector = torch.randn_like(own).requires_grad_()
        text = model.encode_with(["the sky", "the ship"], "sky", [vector])
        assert not torch.allclose(text.embeddings[0], same.embeddings[0])
        torch.testing.assert_close(text.embeddings[1], same.embeddings[1])
        (gradient,) = torch.autograd.grad(text.embeddings[0].square().sum(), vector)
        assert gradient.abs().max() > 0
        torch.testing.assert_close(model.encode(["the sky"]).embeddings[0], same.embeddings[0])
        with pytest.raises(ExpungeError, match="'xyz' is 3 tokens to this model"):
            model.word_vectors("xyz")

    def test_the_name_is_replaced_where_it_stands(self, edit):
        assert replace_name("a photo of the Airplane", edit, "sky") == "a photo of the sky"
        assert replace_name("airplanes", edit, "sky") == "airplanes sky"


SEARCHES = {
    "token_search": {"num_points": 1, "batch_size": 3, "num_words": 1, "choices": 8},
    "encoder_search": {"batch_size": 3, "num_words": 1, "choices": 8},
    "query_search": {"batch_size": 2, "num_words": 1, "population": 2, "begin": "random"},
}
"""The searches over real words, small."""


class TestSearches:
    @pytest.fixture(params=SEARCHES)
    def small(self, request):
        return registry.get("attacks", request.param)(**SEARCHES[request.param], queries=9)

    def test_what_is_found_is_real_words_and_no_erased_name(self, model, edit, small):
        run = RunContext(1)
        found = small.run(model, edit, PROBE, run)
        (finding,) = run.findings  # one search for the one prompt
        assert finding["asked"] == PROBE.prompts[0]
        assert set(found.prompts) == {finding["found"]}
        words = finding["found"].removeprefix("a photo of the ").split()
        assert len(words) == small.num_words
        assert set(words) <= set(model.vocabulary()) - {"airplane"}
        # It can be typed: the string is as many tokens as words were searched.
        assert model.count_tokens(finding["found"]) == model.count_tokens("a photo of the") + len(words)
        assert 0 < finding["queries"] <= small.queries

    def test_a_larger_budget_never_does_worse(self, model, edit, small):
        losses = []
        for queries in (1, 9, 30):
            run = RunContext(0)
            dataclasses.replace(small, queries=queries).run(model, edit, PROBE, run)
            losses.append(run.findings[0]["loss"])
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]

    def test_an_interrupted_search_goes_on_and_keeps_what_it_found(self, model, edit, small, tmp_path):
        long = dataclasses.replace(small, queries=21)

        def stop(label, done, total):
            if label == "searching for words" and done >= 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            long.run(model, edit, PROBE, RunContext(0, stop, tmp_path))
        begun = []
        again, afresh = RunContext(0, lambda _, n, __: begun.append(n), tmp_path), RunContext(0)
        resumed, whole = (long.run(model, edit, PROBE, run).prompts for run in (again, afresh))
        assert resumed == whole
        assert again.findings == afresh.findings
        assert min(n for n in begun if n) >= 6  # it did not begin again

    def test_a_smaller_budget_after_a_larger_is_what_it_is_alone(self, model, edit, small, tmp_path):
        for run in (RunContext(0, folder=tmp_path), RunContext(0)):
            dataclasses.replace(small, queries=21).run(model, edit, PROBE, run)
        kept, alone = RunContext(0, folder=tmp_path), RunContext(0)
        for run in (kept, alone):
            dataclasses.replace(small, queries=9).run(model, edit, PROBE, run)
        assert kept.findings == alone.findings

    def test_a_search_finds_the_word_that_an_edit_leaves_open(self, worded):
        """The edit turns the name to its anchor and leaves a synonym; there are few words to try."""
        problem = Problem((Concept("airplane", "sky"),))
        edit = expunge.erase(worded, problem, UCE(templates=("a photo of the {}",)))
        run = RunContext(0)
        registry.get("attacks", "encoder_search")(num_words=1, queries=300).run(worded, edit, PROBE, run)
        assert run.findings[0]["found"].removeprefix("a photo of the ") in (
            "aeroplane", "plane", "jet", "aircraft", "airliner", "fighter",
        )  # fmt: skip

    def test_words_before_the_prompt_leave_it_as_it_is(self, model, edit):
        small = registry.get("attacks", "token_search")(
            **SEARCHES["token_search"], queries=4, place="before"
        )
        found = small.run(model, edit, PROBE, RunContext(0))
        assert found.prompts[0].endswith(" a photo of the airplane")

    def test_swaps_are_ranked_as_the_loss_changes(self, model):
        """The first is the word toward which the loss falls the steepest, by small steps."""
        space = WordSpace.of(model, (Concept("airplane"),))
        row, goal = torch.tensor([0, 1]), model.encode(["the ship"]).embeddings
        prompt = space.say(row)

        def loss(text):
            return (text.embeddings - goal).square().sum()

        ranked = rank_swaps(model, space, prompt, row, loss, 3)
        assert ranked.shape == (2, 3)
        assert 0 not in ranked[0]  # no word for itself
        own, step = space.embeddings[0][0], 1e-2
        with torch.no_grad():
            slopes = torch.stack([
                loss(model.encode_with([prompt], space.words[0], [own + step * (other - own)]))
                - loss(model.encode_with([prompt], space.words[0], [own - step * (other - own)]))
                for other in space.embeddings[0]
            ])  # fmt: skip
        assert slopes[ranked[0][0]] <= slopes.min() + 0.05 * (slopes.max() - slopes.min())

    def test_the_results_and_the_page_list_what_was_found(self, model, edit, tmp_path):
        table = {**TABLE, "attacks": {"encoder_search": {"queries": [4, 8], "num_words": 1}}}
        suite, cache = Suite.from_table(table, "told"), Cache(tmp_path / "cache")
        report = evaluate(
            model, [edit], [suite], judge=Bright(-1.0), attacks=["encoder_search"],
            roles=("erased",), cache=cache,
        )  # fmt: skip
        report.save(tmp_path / "report")
        (one,) = read_results(tmp_path / "report")["cases"][0]["rows"][1]["attacks"]
        assert one["findings"].keys() == {"queries 4", "queries 8"}
        assert all(f[0]["queries"] <= 8 for f in one["findings"].values())
        assert [point["budget"] for point in one["curve"]] == [0, 4, 8]
        assert one["curve"][0]["seen"] == one["pre-ASR"]
        page = (tmp_path / "report" / "index.html").read_text()
        assert one["findings"]["queries 8"][0]["found"] in page
        assert "How much it takes" in page
        assert page.count("<polyline") == 2  # the edit, and the original
        assert list((tmp_path / "cache" / "attacks").rglob("*.safetensors"))


TABLE = {
    "version": 1,
    "score": "H_c",
    "templates": {"erased": ["a photo of the {}"]},
    "sizes": {"quick": {"erased": 2, "retained": 2}},
    "num_inference_steps": 2,
    "concepts": {"airplane": {}, "bird": {}},
    "attacks": {"embedding": {"radius": [0.4, 0.1], "steps": 1}},
}


def attacked(model, edit, suite, judge, cache, attack="embedding"):
    """What an attack comes to, judged by a metric of the test's own."""
    report = evaluate(
        model, [edit], [suite], judge=judge, attacks=[attack], roles=("erased",), cache=cache
    )
    (found,) = report.cases[0].rows[1].attacks
    return found


class TestJudged:
    def test_budgets_run_from_the_smallest(self):
        ladder = read_ladder(Suite.from_table(TABLE, "told"), "embedding").rungs
        assert list(ladder) == ["radius 0.1", "radius 0.4"]
        assert ladder["radius 0.4"] == Embedding(radius=0.4, steps=1)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"radius": 0.1}, "no budgets for the attack embedding: write one list"),
            ({"radius": [0.1], "steps": [1, 2]}, "write one list"),
            ({"radios": [0.1]}, "did you mean 'radius'"),
            ({"radius": [-1]}, "radius must be at least 0"),
            ({"radius": [0.1, 0]}, "told: the attack embedding at radius 0 changes nothing"),
            ({"radius": [0.1], "steps": 0}, "at radius 0.1 changes nothing"),
        ],
    )
    def test_budgets_that_are_none(self, table, message):
        suite = Suite.from_table({**TABLE, "attacks": {"embedding": table}}, "told")
        with pytest.raises(ExpungeError, match=message):
            read_ladder(suite, "embedding")

    def test_dearer_ladders_are_asked_for_by_name(self):
        suite = Suite.read("object")
        assert list(read_ladder(suite, "inversion").rungs) == ["steps 50", "steps 150"]
        (longest,) = read_ladder(suite, "inversion:cce").rungs.values()
        assert (longest.steps, longest.batch_size) == (5000, 16)
        restarts = read_ladder(suite, "embedding:restarts").rungs.values()
        assert [one.restarts for one in restarts] == [1, 4, 8]
        bare = Suite.from_table({**TABLE, "attacks": {}}, "told")  # one that names none has them, too
        assert read_ladder(bare, "inversion:cce").rungs.keys() == {"steps 5000"}
        with pytest.raises(ExpungeError, match='"inversion:ccee".*there are some for.* inversion:cce'):
            read_ladder(suite, "inversion:ccee")
        with pytest.raises(ExpungeError, match="no attack 'invrsion'; did you mean 'inversion'"):
            Suite.from_table({**TABLE, "attacks": {"invrsion:cce": {}}}, "told")

    def test_the_smallest_strength_keeps_most_of_the_image_and_comes_last(self):
        ladder = read_ladder(Suite.from_table(TABLE, "told"), "image_to_image").rungs
        assert [one.strength for one in ladder.values()] == [0.9, 0.7, 0.5, 0.3]

    def test_every_attacks_budget_of_0_is_refused(self):
        for name, field in (("inversion", "steps"), ("finetuning", "max_train_steps")):
            suite = Suite.from_table({**TABLE, "attacks": {name: {field: [0, 5]}}}, "told")
            with pytest.raises(ExpungeError, match=f"{field} 0 changes nothing"):
                read_ladder(suite, name)

    def test_all_is_every_first_ladder_and_the_rest_is_listed(self, model):
        suite = Suite.from_table(TABLE, "told")
        ladders, not_run = choose_ladders(suite, ["all", "inversion:long"], model)
        assert [one.name for one in ladders] == ["inversion:long", *ATTACKS]
        by_name = {one.name: one for one in ladders}
        assert list(by_name["embedding"].rungs) == ["radius 0.1", "radius 0.4"]  # the suite's own
        assert next(iter(by_name["finetuning"].rungs)) == "max_train_steps 50"  # the attack's
        assert set(not_run.values()) == {""}
        assert "finetuning:concept" in not_run
        assert "inversion:long" not in not_run
        ladders, _ = choose_ladders(suite, [Embedding(radius=0.2), "all"], model)
        assert sorted(one.name for one in ladders) == sorted(ATTACKS)

    def test_what_a_family_cannot_have_is_left_out_with_the_reason(self):
        suite, other = Suite.from_table(TABLE, "told"), expunge.load(flux())
        ladders, not_run = choose_ladders(suite, ["all"], other)
        trained = ("finetuning", "foreign_lora")
        assert [one.name for one in ladders] == [name for name in ATTACKS if name not in trained]
        assert not_run["finetuning"].startswith("it needs cross-attention, and Flux has none: text")
        with pytest.raises(ExpungeError, match="finetuning:concept cannot be made on this model: it"):
            choose_ladders(suite, ["finetuning:concept"], other)

    def test_misspelt_ladders_and_all(self):
        suite = Suite.from_table(TABLE, "told")
        for name, says in (
            ("inversion:lnog", "did you mean 'inversion:long'"),
            ("al", "no attack 'al'; did you mean 'all'"),
            ("all:long", "all is every attack's first ladder and has no ladders of its own"),
        ):
            with pytest.raises(ExpungeError, match=says):
                choose_ladders(suite, [name])

    def test_a_muddle_is_neither_back_nor_defended(self, model, edit, tmp_path):
        """Of two images one is always broken: beside ASR stands how many such there are."""
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path)
        seen = []

        @dataclasses.dataclass(frozen=True)
        class Breaks(Bright):
            def measure(self, images, prompts, references=None):
                seen.append(len(images))
                first = len(seen) > 1  # all but the original's images
                rows = torch.ones(len(images), 2)
                rows[0, 1] = float(first) + 1
                return rows

            def find_broken(self, rows):
                return rows[:, 1] > 1.5

        found = attacked(model, edit, suite, Breaks(0.5), cache)
        assert found.pre.value == 0.5
        assert [asr.value for asr in found.asr.values()] == [0.5, 0.5]
        assert found.pre_broken.value == 0.5
        assert [one.value for one in found.broken.values()] == [0.5, 0.5]
        table = json.loads(json.dumps(found.to_dict()))["unrecognisable"]
        assert table.keys() == {"unattacked", "radius 0.1", "radius 0.4"}

    def test_an_attack_that_is_none(self):
        with pytest.raises(ExpungeError, match="no attack 'embeding'; did you mean 'embedding'"):
            Suite.from_table({**TABLE, "attacks": {"embeding": {}}}, "told")

    def test_success_is_counted_where_the_original_draws_the_concept(self, model, edit, tmp_path):
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path)
        probe = Probe.of("a photo of the airplane", n=2, num_inference_steps=2)
        bright = model.draw(probe).mean((1, 2, 3))
        judge = Bright(float(bright.mean()))  # so it is in one of two images
        found = attacked(model, edit, suite, judge, cache)
        assert json.loads(json.dumps(found.to_dict()))["ASR"].keys() == {"radius 0.1", "radius 0.4"}
        assert found.pre.n == 1
        with model.using(edit):
            after = model.draw(probe).mean((1, 2, 3))
        assert found.pre.value == float(after[bright.argmax()] > judge.threshold)
        shares = [found.pre.value, *(asr.value for asr in found.asr.values())]
        assert shares == sorted(shares)
        rows = found.strip.rows
        assert [name.partition(":")[0] for name, _ in rows] == [
            "before", "after", "radius 0.1", "radius 0.4"]  # fmt: skip
        with model.using(edit):
            drawn_after = model.draw(probe)
        for (_, images), drawn in zip(rows[:2], (model.draw(probe), drawn_after), strict=True):
            torch.testing.assert_close(torch.stack(list(images)), drawn, atol=3e-3, rtol=0)
        drawn = cache.drawn
        attacked(model, edit, suite, judge, cache)
        assert cache.drawn == drawn  # an attacked image, too, is drawn once


@dataclasses.dataclass(frozen=True)
class Bright(Classifier):
    """Sees whatever is asked for in every bright image."""

    threshold: float

    @property
    def provenance(self):
        return {}

    def measure(self, images, prompts, references=None):
        return images.mean((1, 2, 3))[:, None]

    def knows(self, label):
        return True

    def score(self, rows, labels, near, question):
        return (rows[:, 0] > self.threshold).float()

    def find_broken(self, rows):
        return torch.zeros(len(rows), dtype=torch.bool)


@dataclasses.dataclass(frozen=True)
class Rounded(Attack):
    """Weights of the denoiser with few bits: a condition that changes the model."""

    bits: int = 4
    entered: ClassVar[list] = []

    @contextmanager
    def apply(self, model, edit, run):
        self.entered.append(len(edit.changes))
        with model.using(edit):
            network = model.network.conv_out.weight
            before, top = network.data.clone(), network.data.abs().max() / 2 ** (self.bits - 1)
            network.data = (network / top).round() * top
            try:
                yield model
            finally:
                network.data = before


@dataclasses.dataclass(frozen=True)
class Phrased(Attack):
    """Another way to ask: a condition that changes the prompt."""

    by: str = "a drawing of the ship"

    def run(self, model, edit, probe, run):
        return dataclasses.replace(probe, prompts=(self.by,) * len(probe))


class TestConditions:
    """What an attack may change besides the text: the model, or the prompt."""

    def test_a_changed_model_is_made_once_and_only_for_what_is_not_there(self, model, edit, tmp_path):
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path)
        before = weights(model.pipe)
        Rounded.entered.clear()
        found = attacked(model, edit, suite, Bright(-1.0), cache, Rounded(bits=2))
        assert Rounded.entered == [0, len(edit.changes)]  # the original as control, and the edit
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        assert list(found.asr) == ["bits 2"]
        assert found.control["bits 2"].value == 1
        assert found.control_holds("bits 2")
        drawn = cache.drawn
        assert drawn == 2 + 2 + 2 + 2  # two images of each: plain and changed, original and edited
        attacked(model, edit, suite, Bright(-1.0), cache, Rounded(bits=2))
        assert (cache.drawn, len(Rounded.entered)) == (drawn, 2)
        attacked(model, edit, suite, Bright(-1.0), cache, Rounded(bits=3))
        assert len(Rounded.entered) == 4  # other weights, other images

    def test_what_is_drawn_is_what_the_changed_model_draws(self, model, edit, tmp_path):
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path)
        probe, attack = Probe.of("a photo of the airplane", n=2, num_inference_steps=2), Rounded(bits=1)
        found = attacked(model, edit, suite, Bright(-1.0), cache, attack)
        with attack.apply(model, edit, RunContext()) as changed:
            expected = changed.draw(probe)
        rows = dict(found.strip.rows)
        (label,) = (name for name in rows if name.startswith("bits 1"))
        torch.testing.assert_close(torch.stack(list(rows[label])), expected, atol=3e-3, rtol=0)

    def test_a_control_that_fails_does_not_count(self, model, edit, tmp_path):
        """An attack that draws something else altogether: the original shows the concept no more."""
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path)

        @dataclasses.dataclass(frozen=True)
        class Named(Bright):
            def measure(self, images, prompts, references=None):
                return torch.tensor([[float("airplane" in prompt)] for prompt in prompts])

        found = attacked(model, edit, suite, Named(0.5), cache, Phrased())
        (budget,) = found.seen
        assert (found.pre.value, found.control[budget].value, found.seen[budget].value) == (1, 0, 0)
        assert found.asr[budget].value == 1  # nobody has to attack
        assert not found.control_holds(budget)
        assert found.difference[budget].value == -1
        score = found.difference[budget].score
        assert score.low <= -1 <= score.high <= 0
        assert not found.to_dict()["control"][budget]["holds"]

    def test_an_attack_changes_something_and_keeps_rows(self, model, edit, tmp_path):
        @dataclasses.dataclass(frozen=True)
        class Idle(Attack):
            pass

        @dataclasses.dataclass(frozen=True)
        class Fewer(Attack):
            def run(self, model, edit, probe, run):
                return Probe(probe.prompts[:1], probe.seeds[:1])

        with pytest.raises(TypeError, match="Idle must override run or apply"):
            Idle()
        suite = Suite.from_table(TABLE, "told")
        with pytest.raises(ExpungeError, match="Fewer made 1 images of 2"):
            attacked(model, edit, suite, Bright(-1.0), Cache(tmp_path), Fewer())

    def test_a_condition_may_train(self, model, edit, tmp_path):
        @dataclasses.dataclass(frozen=True)
        class Tuned(Attack):
            @contextmanager
            def apply(self, model, edit, run):
                with model.using(edit), torch.enable_grad():
                    weight = model.network.conv_out.weight
                    before = weight.data.clone()
                    latents = torch.zeros(1, 4, 8, 8)
                    loss = model.predict(latents, 1, model.encode(["a ship"])).square().mean()
                    (gradient,) = torch.autograd.grad(loss, weight)
                    weight.data -= gradient
                    try:
                        yield model
                    finally:
                        weight.data = before

        suite = Suite.from_table(TABLE, "told")
        found = attacked(model, edit, suite, Bright(-1.0), Cache(tmp_path), Tuned())
        rows = dict(found.strip.rows)
        after, tuned = list(rows)[1:]
        assert not torch.equal(torch.stack(list(rows[after])), torch.stack(list(rows[tuned])))


class TestInTheReport:
    @pytest.fixture
    def report(self, model, edit, tmp_path):
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path / "cache")
        attacks = ["embedding", Rounded()]
        report = evaluate(model, [edit], [suite], judge=Bright(-1.0), attacks=attacks, cache=cache)
        report.save(tmp_path / "report")
        return report

    def test_results_hold_every_attack_and_are_read_again(self, report, tmp_path):
        table = read_results(tmp_path / "report")
        original, row = table["cases"][0]["rows"]
        assert "attacks" not in original
        assert [one["attack"] for one in row["attacks"]] == ["embedding", "Rounded"]
        budgets = row["attacks"][0]["ASR"]
        assert budgets["radius 0.4"] == {"value": 1, "n": 2, **{
            side: pytest.approx(budgets["radius 0.4"][side]) for side in ("low", "high")}}  # fmt: skip
        assert table["provenance"]["attack seed"] == 0
        assert table["provenance"]["metrics"]["Bright"]["higher is better"]
        assert not (tmp_path / "report" / "robustness.json").exists()
        head = (tmp_path / "report" / "results.csv").read_text().splitlines()[0].split(",")
        assert {"embedding pre-ASR", "embedding radius 0.4 ASR", "Rounded as it is control"} <= set(head)

    def test_the_page_has_a_table_and_the_images(self, report, tmp_path):
        page = (tmp_path / "report" / "index.html").read_text()
        assert "Under attack" in page
        assert "embedding, radius 0.4" in page
        assert page.count('class="attacked"') == 2
        assert "the control fails" not in page
        assert "Does it stay gone?" in page
        assert page.count('<td class="left said">') == 3  # two radii, and the rounding
        assert "What was not tested" in page
        assert "inversion:cce" in page.partition("What was not tested")[2].partition("</ul>")[0]

    def test_verdicts_are_of_the_interval_and_the_control(self, report):
        (case,) = report.cases
        one, _ = case.rows[1].attacks
        budget = "radius 0.4"

        def say(low, high, control=1.0, broken=0.0):
            def fixed(value, low, high):
                return mock.Mock(value=value, n=20, score=mock.Mock(value=value, low=low, high=high))

            told = dataclasses.replace(
                one,
                seen={budget: fixed(0.5, 0, 1)},
                difference={budget: fixed((low + high) / 2, low, high)},
                control={budget: fixed(control, 0, 1)},
                broken={budget: fixed(broken, 0, 1)},
            )
            return say_verdict(told, budget).replace("\N{NO-BREAK SPACE}", " ")

        assert say(0.2, 0.8) == "It comes back: seen in 50 % of the images."
        assert say(-0.3, 0.05).startswith("No more than without it: a rise above 5 % is ruled out")
        assert "20 images cannot rule out one of 30 points" in say(-0.1, 0.3)
        assert say(0.2, 0.8, control=0.4) == (
            "The original itself draws it in only 40 %: this condition says nothing."
        )
        assert "itself draws it in none of the images: this" in say(0.2, 0.8, control=0)
        assert say(0.2, 0.8, broken=0.3).endswith("30 % are unrecognisable.")

    def test_results_of_earlier_versions_are_read_as_ones_of_today(self, report, tmp_path):
        table = json.loads((tmp_path / "report" / "results.json").read_text())
        row = table["cases"][0]["rows"][1]
        kept = [{"suite": "told", "edit": "mine", **one} for one in row.pop("attacks")]
        kept[1]["edit"] = row["name"]
        erased = row["roles"]["erased"]
        erased["there"] = shown = erased.pop("present")
        table["cases"][0]["suite"]["question"] = "best"
        table["format"] = 1
        table["cases"][0]["pictures"] = table["cases"][0].pop("images")
        (tmp_path / "results.json").write_text(json.dumps(table))
        (tmp_path / "robustness.json").write_text(json.dumps(kept))
        found = read_results(tmp_path / "results.json")
        assert found["cases"][0]["images"] == 4
        assert "pictures" not in found["cases"][0]
        assert found["cases"][0]["suite"]["question"] == "top1"
        assert found["cases"][0]["rows"][1]["roles"]["erased"]["present"] == shown
        assert found["format"] == 3
        assert [one["attack"] for one in found["cases"][0]["rows"][1]["attacks"]] == ["Rounded"]
        for text, says in (
            ("{}", "is not a report"),
            ('{"format": 9}', "reads up to 3"),
            ("x", "is not"),
        ):
            (tmp_path / "results.json").write_text(text)
            with pytest.raises(ExpungeError, match=says):
                read_results(tmp_path)

    def test_what_cannot_be_attacked_is_said_before_anything_is_drawn(self, model, edit, tmp_path):
        suite, cache = Suite.from_table(TABLE, "told"), Cache(tmp_path)
        own = Candidate("folder", ("airplane",), model=model)
        for edits, attacks, error, says in (
            (
                [own],
                ["embedding"],
                ExpungeError,
                "folder is a model of its own; an attack needs",
            ),
            ([edit], ["embeding"], ExpungeError, "did you mean 'embedding'"),
            ([edit], [3], TypeError, "an attack must be a name or an Attack, not 3"),
            ([edit], ["embedding", "embedding"], ExpungeError, "an attack is named twice"),
            (["edit"], [], TypeError, "must be an Edit or a Candidate, not 'edit'"),
        ):
            with pytest.raises(error, match=says):
                evaluate(model, edits, [suite], attacks=attacks, cache=cache)
        with pytest.raises(TypeError, match="a metric must be a name or a Metric, not 3"):
            evaluate(model, [edit], [suite], metrics=[3], cache=cache)
        with pytest.raises(TypeError, match="a judge must be a Classifier, not 'detector'"):
            evaluate(model, [edit], [suite], judge="detector", cache=cache)
        with pytest.raises(TypeError, match="the original must be a Model, as expunge.load gives"):
            evaluate("emoji", [edit], [suite], cache=cache)
        with pytest.raises(ExpungeError, match="no role 'erasd'; did you mean 'erased'"):
            evaluate(model, [edit], [suite], roles=("erasd",), cache=cache)
        assert cache.drawn == 0


def test_an_attack_that_is_none_is_said_before_anything_is_drawn(capsys):
    arguments = ["evaluate", "no.safetensors", "--suite", "object", "--attacks", "embeding", "-o", "x"]
    assert main(arguments) == 2
    assert "no attack 'embeding'; did you mean 'embedding'" in capsys.readouterr().err


def test_attacks_are_read_one_after_the_other_and_the_old_option_is_answered(capsys):
    from expunge.cli.evaluate import EvaluateOptions
    from expunge.cli.options import parse_options

    given = ["e.safetensors", "--attacks", "embedding", "inversion:long", "-o", "x", "--attacks", "a"]
    found = parse_options(EvaluateOptions, "evaluate", given)
    assert found.attacks == (("embedding", "inversion:long"), ("a",))
    same = ["e.safetensors", "--conditions", "all", "-o", "x"]
    assert parse_options(EvaluateOptions, "evaluate", same).attacks == (("all",),)
    old = ["evaluate", "e.safetensors", "--suite", "object", "--attack", "embedding", "-o", "x"]
    assert main(old) == 2
    assert "the option --attack of evaluate is named --attacks now" in capsys.readouterr().err


def test_an_attacked_image_has_an_address_of_its_own(model, edit, tmp_path):
    plain = Request("a photo of the airplane", 0, 2, 3.0)
    text = model.encode(["a photo of the ship"])
    attacked = dataclasses.replace(plain, text=text, text_hash="1")
    source = Source(model, (edit,))
    assert source.address(plain) == source.address(Request("a photo of the airplane", 0, 2, 3.0))
    assert (
        len({source.address(r) for r in (plain, attacked, dataclasses.replace(attacked, text_hash="2"))})
        == 3
    )
    first, second = Cache(tmp_path).draw(source, [plain, attacked])
    assert not torch.equal(first, second)
