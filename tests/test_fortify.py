"""ACE's third stage: what attacks get from cross-attentions trained against them, and what stays."""

import dataclasses

import pytest
import torch

import expunge
from expunge import Concept, Edit, ExpungeError, Problem
from expunge.changes import Dense, Gated
from expunge.erasing.parameters import select_parameters
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.method import Method
from expunge.methods.ace import ACE
from expunge.methods.ace import fortify as fortifying
from expunge.methods.ace.fortify import Attacks, FortifyConfig
from expunge.methods.ace.fortify_finetune import Trainer
from expunge.ops.finetune import frozen
from expunge.ops.in_place import InPlace
from expunge.runtime.context import RunContext

SHORT = TEMPLATES["object"][:2]
CONFIG = FortifyConfig(60, 6e-4, radius=0.5, noisiest=0.5, retain_weight=3.0)
WIDER = dataclasses.replace(CONFIG, radius=0.8)
FORTIFY = ACE(
    stages=("gate", "fortify"),
    templates=SHORT,
    num_retain_words=12,
    max_overlap=1.0,
    fortify_steps=60,
    fortify_learning_rate=6e-4,
    fortify_retain=3.0,
)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer images than the emoji model's."""
    monkeypatch.setattr("expunge.methods.ace.fortify_data.CONCEPT_IMAGES", 3)
    monkeypatch.setattr("expunge.methods.ace.fortify_data.WORD_IMAGES", 6)
    monkeypatch.setattr("expunge.methods.ace.fortify.LEVELS", 6)


@pytest.fixture
def problem() -> Problem:
    return Problem((Concept("airplane", "sky"),), ("ship",))


class TestAttacks:
    def test_every_token_stays_in_its_ball_and_goes_down(self):
        words = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
        attacks = Attacks(words, 2, CONFIG, torch.Generator().manual_seed(1))
        rows, gradient = torch.tensor([1, 4]), torch.ones(2, 3, 4)
        reach = 0.5 * attacks.start[rows].norm(dim=-1)
        attacks.move(rows, gradient)
        torch.testing.assert_close(attacks.shift[rows].norm(dim=-1), 0.1 * reach)
        assert bool((attacks.shift[rows] < 0).all())
        for _ in range(20):
            attacks.move(rows, gradient)
        torch.testing.assert_close(attacks.shift[rows].norm(dim=-1), reach)
        assert attacks.shift.count_nonzero() == 2 * 3 * 4  # the others have not moved

    def test_begins_anew_after_its_moves(self):
        words = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
        attacks = Attacks(words, 3, CONFIG, torch.Generator().manual_seed(1))
        assert len(attacks.start) == CONFIG.n_attacks
        assert set(attacks.owner.tolist()) == {0, 1, 2}
        before = attacks.begun.clone()
        for _ in range(CONFIG.max_attack_steps):
            attacks.move(torch.tensor([2]), torch.ones(1, 3, 4))
            assert attacks.shift[2].any()
        attacks.renew()
        assert not attacks.shift.any()
        assert int(attacks.moves[2]) == 0
        others = [i for i in range(CONFIG.n_attacks) if i != 2]
        assert torch.equal(attacks.begun[others], before[others])


class TestTrainer:
    """The user who trains the model further while it is fortified."""

    @pytest.fixture
    def parts(self, model):
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = model.encode(["the ship", "a bird", "a dog", "a cat"])
        with frozen(model.parameters()), InPlace(select_parameters(model, "cross-attention")) as trained:
            yield model, trained, [(text, latents)]

    def make(self, parts, steps, rate=1e-3):
        generator = torch.Generator().manual_seed(1)
        return Trainer(*parts, steps, rate, 4, generator)

    def test_moves_on_beside_the_weights_and_begins_anew(self, parts):
        model = parts[0]
        user, before = self.make(parts, 3), [p.detach().clone() for p in model.parameters()]
        for n in (1, 2):
            user.step()
            assert int(user.done) == n
            most = max(float(moved.abs().max()) for moved in user.moved)
            assert 0 < most <= n * 1e-3 + 1e-9
            # The network has the weights alone; the user's are written where they are asked for.
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        user.write()
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        user.step()
        assert not any(moved.any() for moved in user.moved)

    def test_learns_what_is_trained_on(self, parts):
        model, _, ((text, latents),) = parts
        user, level = self.make(parts, 1000), torch.full((4,), 300)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))

        def loss():
            with torch.no_grad():
                z = model.add_noise(latents, noise, level)
                return float((model.predict(z, level, text) - noise).square().mean())

        first = loss()
        for _ in range(40):
            user.step()
        user.write()
        assert loss() < first

    def test_nobody_trains_where_no_steps_are_asked_for(self, parts):
        user, numbers = self.make(parts, 0), torch.Generator().manual_seed(1)
        user.step()
        user.write()
        assert not user.moved
        assert torch.equal(user.generator.get_state(), numbers.get_state())  # no number is drawn


class TestFortify:
    def test_the_user_who_trains_changes_what_is_found(self, worded, problem):
        plain, against = (
            expunge.erase(
                worded,
                problem,
                dataclasses.replace(FORTIFY, fortify_steps=3, fortify_finetune_steps=n),
            ).changes[1:]
            for n in (0, 2)
        )
        assert any(not torch.equal(a.value, b.value) for a, b in zip(plain, against, strict=True))

    def test_attacks_end_nearer_to_the_anchor_and_the_rest_stays(self, worded, problem):
        """Measured on attacks that training has not seen: other words, other noise, many moves."""
        soft = expunge.erase(worded, problem, dataclasses.replace(FORTIFY, stages=("gate",)))
        hard = expunge.erase(
            worded, problem, dataclasses.replace(FORTIFY, fortify_steps=160, fortify_retain=2.0)
        )
        gates, *rest = hard.changes
        assert torch.equal(gates.direction, soft.changes[0].direction)
        assert rest
        assert all(isinstance(change, Dense) and ".attn2." in change.layers[0] for change in rest)

        e, n, r = (worded.encode([SHORT[0].format(name)] * 16) for name in ("airplane", "sky", "ship"))
        t = torch.linspace(520, 990, 16).long()
        z = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            concept, anchor, ship = (worded.predict(z, t, text) for text in (e, n, r))
        far = (concept - anchor).square().mean()

        def reached(edit: Edit) -> tuple[float, float, float]:
            """How near an attack comes to the concept, and to the anchor; how far what stays moves."""
            text = worded.encode([SHORT[0].format(name) for name in ("dog", "truck", "frog", "cat") * 4])
            attacks = Attacks(text.embeddings, 1, WIDER, torch.Generator().manual_seed(0))
            attacks.begun = torch.arange(16)
            with worded.using(edit):
                for _ in range(100):
                    shift = attacks.shift.clone().requires_grad_()
                    given = dataclasses.replace(text, embeddings=text.embeddings + shift)
                    near = (worded.predict(z, t, given) - concept).square().mean()
                    attacks.move(torch.arange(16), torch.autograd.grad(near, shift)[0])
                given = dataclasses.replace(text, embeddings=text.embeddings + attacks.shift)
                with torch.no_grad():
                    found = worded.predict(z, t, given)
                    moved = (worded.predict(z, t, r) - ship).square().mean() / far
            off = [float((found - x).square().mean() / far) for x in (concept, anchor)]
            return off[0], off[1], float(moved)

        before, after = reached(soft), reached(hard)
        assert (
            before[0] < 0.5 * before[1]
        )  # an attack on the gates alone finds the concept, not the anchor
        # Of the fortified it gets what is nearer to the anchor. That it gets less of the concept does
        # not show on random weights, which any text moves about: experiments/attacked.py shows it.
        assert after[1] < 0.9 * before[1]
        # What is retained stays.
        assert after[2] < 0.1

    def test_the_model_is_left_as_it_was(self, worded, problem):
        before = [p.clone() for p in worded.parameters()]
        expunge.erase(worded, problem, dataclasses.replace(FORTIFY, fortify_steps=2))
        assert all(torch.equal(a, b) for a, b in zip(before, worded.parameters(), strict=True))
        assert all(p.grad is None for p in worded.parameters())

    @pytest.mark.parametrize("finetune", [0, 4])
    def test_goes_on_from_its_checkpoint_and_ends_the_same(
        self, worded, problem, tmp_path, finetune, monkeypatch
    ):
        monkeypatch.setattr(fortifying, "KEEP_EVERY", 5)
        method = dataclasses.replace(FORTIFY, fortify_steps=8, fortify_finetune_steps=finetune)
        whole = method.fit(worded, problem, RunContext())

        class KilledError(Exception):
            pass

        def kill(label: str, done: int, total: int) -> None:
            if label == "fortifying" and done == 7:
                raise KilledError

        with pytest.raises(KilledError):
            method.fit(worded, problem, RunContext(0, kill, tmp_path))
        seen: list[int] = []

        def note(label: str, done: int, total: int) -> None:
            if label == "fortifying":
                seen.append(done)

        again = method.fit(worded, problem, RunContext(0, note, tmp_path))
        assert seen[0] == fortifying.KEEP_EVERY
        for one, other in zip(whole[1:], again[1:], strict=True):
            torch.testing.assert_close(one.value, other.value, rtol=0, atol=0)

    def test_several_concepts_at_once(self, worded):
        two = Problem((Concept("airplane", "sky"), Concept("dog", "")), ("ship",))
        gates, *rest = expunge.erase(worded, two, dataclasses.replace(FORTIFY, fortify_steps=2)).changes
        assert isinstance(gates, Gated)
        assert rest

    def test_follows_hardening(self, worded, problem):
        fields = {
            "rounds": 1,
            "max_train_steps": 2,
            "num_images": 1,
            "num_inference_steps": 2,
            "recovery_threshold": 0.0,
        }
        method = dataclasses.replace(FORTIFY, fortify_steps=2, **fields)
        hard = dataclasses.replace(method, stages=("gate", "harden"))
        both = dataclasses.replace(method, stages=("fortify", "harden", "gate"))
        assert both.stages == ("gate", "harden", "fortify")
        (one,) = expunge.erase(worded, problem, hard).changes
        other = expunge.erase(worded, problem, both).changes[0]
        assert torch.equal(one.direction, other.direction)

    def test_its_cost_is_in_the_plan(self, problem):
        more = dataclasses.replace(FORTIFY, fortify_steps=500).estimate_cost(problem, 12)
        less = FORTIFY.estimate_cost(problem, 12)
        assert more.gradients > less.gradients > 0
        assert more.predictions > less.predictions

    def test_bad_input(self, worded, problem):
        with pytest.raises(ExpungeError, match="hardened or fortified"):
            ACE(stages=("gate", "fortify"), reduction="layer")
        with pytest.raises(ExpungeError, match="fortify_radius"):
            ACE(fortify_radius=0.0)
        assert issubclass(ACE, Method)
