"""ACE's third stage: train the cross-attentions until no text calls a concept back.

Gates close a region of text space. A word that is learnt against them stands outside that region, and
the cross-attentions read the concept from it all the same. So here they are trained, against attacks
that start at the prompts of other words and may move nearly anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.changes import Changes, Dense, Gated
from expunge.erasing.parameters import select_parameters
from expunge.methods.ace.fortify_finetune import Trainer
from expunge.model import Model
from expunge.ops.finetune import KEEP_EVERY, diverged, frozen, warn_diverged
from expunge.ops.in_place import InPlace
from expunge.ops.noise_error import Loss, average_error, bound_error
from expunge.ops.pgd import step_in_ball
from expunge.runtime.context import RunContext, Tensors
from expunge.text import Text

LEVELS, DRAWS = 24, 4
"""At how many timesteps, evenly spaced, concept and anchor are compared, and with how many noises."""


@dataclass(frozen=True)
class FortifyConfig:
    """How the cross-attentions are trained, and attacked meanwhile."""

    max_train_steps: int
    """Training steps, in all."""
    learning_rate: float
    """Adam's learning rate at first; it falls linearly to 0."""
    radius: float
    """How far an attack may move each token, as a share of the token's norm."""
    noisiest: float
    """The share of all timesteps, from pure noise on, at which the concept is turned to its anchor."""
    retain_weight: float
    """ρ, weight of what stays."""
    n_attacks: int = 16
    """How many attacks go on at a time."""
    batch_size: int = 8
    """How many of them a training step takes, at most."""
    max_attack_steps: int = 40
    """After how many moves an attack begins anew."""
    attack_step: float = 0.1
    """How far an attack moves at once, as a share of its radius."""
    concept_share: float = 0.3
    """The share of what stays that is met on noisy images of a concept instead of its own."""
    finetune_steps: int = 0
    """After how many steps a user who trains the model further meanwhile begins anew; 0 for none."""
    finetune_rate: float = 1e-4
    """That user's learning rate."""
    loss: Loss = "squared"
    """How errors of what is trained count."""


@dataclass(frozen=True, eq=False)
class FortifyTarget:
    """A concept that must not come back."""

    name: str
    text: Text
    """(1,), its prompt."""
    anchor: Text
    """(1,), its anchor's."""
    latents: Tensor
    """(n, c, h, w), images of it."""


@dataclass(frozen=True, eq=False)
class RetainSet:
    """What must stay."""

    text: Text
    """(n,) prompts."""
    latents: Tensor
    """(n, c, h, w), an image of each."""
    words: Text
    """(m,) prompts of other words; attacks start at them."""


def train_against_attacks(
    model: Model,
    gates: Gated,
    targets: Sequence[FortifyTarget],
    retained: RetainSet,
    run: RunContext,
    config: FortifyConfig,
) -> Changes:
    """Train the cross-attentions behind the gates.

        inner   min_δ ‖ε(z_t, t, ẽ(r + δ)) − ε₀(z_t, t, e)‖²,    ‖δ_token‖ ≤ radius ‖r_token‖
        outer   min E ‖ε(z_t, t, ẽ(r + δ)) − ε₀(z_t, t, e_anchor)‖² / a_t
                    + ρ ‖ε(y_t, t, ẽ(h)) − ε₀(y_t, t, h)‖² / a

    z_t are noisy images of the concept, r other words' prompts, ẽ the gates, h what stays, y_t images of
    it and, in part, of the concept or of another; a_t is how far apart the original's predictions for
    concept and anchor are at that timestep, a its mean over timesteps. t is drawn from the noisiest
    timesteps, where it is decided what an image shows. An attack makes one move a step, on the weights
    as they are then, and after some moves begins at another word.

    With `finetune_steps` a user trains the model further meanwhile (`fortify_finetune.py`), and the
    first term is taken where that user has come to.

    An attack moves the tokens of a prompt behind the text encoder, each within its ball. Words as
    textual inversion learns them, before the text encoder, are not trained against.

    Args:
        model: the original.
        gates: the closed form, hardened or not; not changed.
        targets: the concepts.
        retained: what stays.
        run: its seed; the state is saved in its folder, and training resumes from there.
        config: the training and the attacks.

    Returns:
        The new weight of each parameter.

    Raises:
        ExpungeError: the model has no cross-attentions, or the loss diverges at once.

    Source: ours; the two problems in turns are Madry et al., ICLR 2018, arXiv 1706.06083, attacks that
    go on from step to step are after Shafahi et al., NeurIPS 2019, arXiv 1904.12843.
    """
    generator = run.generator("fortifying", *(target.name for target in targets))
    levels = len(model.log_snr())
    apart = [_measure_distances(model, target, generator) for target in targets]
    mean = torch.stack(apart).mean()
    attacks = Attacks(retained.words.embeddings, len(targets), config, generator)
    every = torch.cat([retained.latents, *(target.latents for target in targets)])
    own = torch.cat([target.latents for target in targets])
    trained = InPlace(select_parameters(model, "cross-attention"))
    optimiser = torch.optim.Adam(trained.values, lr=config.learning_rate, foreach=False)
    # What is trained on: the retained, and the concepts, each image with its own prompt.
    named = Text.joined([target.text[[0] * len(target.latents)] for target in targets])
    user = Trainer(
        model,
        trained,
        [(retained.text, retained.latents), (named, own)],
        config.finetune_steps,
        config.finetune_rate,
        config.batch_size,
        generator,
    )
    start, losses = _resumed(run, trained, optimiser, attacks, user)
    sound: list[Tensor] = []

    def below(n: int, count: int) -> Tensor:
        return torch.randint(n, (count,), generator=generator)

    def noisy(latents: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return model.add_noise(latents, noise, t.to(latents.device))

    def predict(z: Tensor, t: Tensor, text: Text) -> Tensor:
        return model.predict(z, t.to(z.device), text)

    def gated(text: Text, embeddings: Tensor) -> Text:
        return dataclasses.replace(text, embeddings=gates.change_input(embeddings))

    with frozen(model.parameters()), trained, torch.enable_grad():
        trained.write()
        for step in range(start, config.max_train_steps):
            run.progress("fortifying", step, config.max_train_steps)
            # Drawn with replacement and made unique: a step may take fewer, and no attack moves
            # twice.
            rows = below(config.n_attacks, config.batch_size).unique()
            whose = attacks.owner[rows].tolist()
            here = [targets[i] for i in whose]
            t = levels - 1 - below(max(1, int(config.noisiest * levels)), len(rows))
            z = noisy(torch.stack([x.latents[int(below(len(x.latents), 1))] for x in here]), t)
            weigh = torch.stack([1 / apart[i][at] for i, at in zip(whose, t.tolist(), strict=True)]).to(
                z
            )
            n = config.batch_size
            kept = below(len(retained.text), n).tolist()
            words = below(len(retained.words), n).tolist()
            many = int(2 * n * config.concept_share)
            shown = torch.cat([
                retained.latents[kept],
                every[below(len(every), n - many)],
                own[below(len(own), many)],
            ])  # fmt: skip
            at = below(levels, len(shown))
            y = noisy(shown, at)
            staying = Text.joined([retained.text[kept], retained.words[words]])
            # The targets are the original's: without the trained weights.
            with trained.off(), torch.no_grad():
                concept = predict(z, t, Text.joined([x.text for x in here]))
                anchor = predict(z, t, Text.joined([x.anchor for x in here]))
                same = predict(y, at, staying)
            user.write()
            prompts = retained.words[attacks.begun[rows].tolist()]
            shift = attacks.shift[rows].requires_grad_()
            begun = attacks.start[rows]
            near = (predict(z, t, gated(prompts, begun + shift)) - concept).square().mean((1, 2, 3))
            (gradient,) = torch.autograd.grad((near * weigh).sum(), shift)
            attacks.move(rows, gradient)
            # Predicted anew: the attack has just moved.
            found = predict(z, t, gated(prompts, begun + attacks.shift[rows]))
            # In units of how far concept and anchor are apart at that timestep, or early ones would
            # rule.
            errors = bound_error((found - anchor).square().mean((1, 2, 3)), config.loss)
            loss = (errors * weigh).mean()
            away = trained.gradients(loss) if user.moved else None
            # What stays must stay without the user: whoever trains the model changes it anyway.
            trained.write()
            moved = predict(y, at, gated(staying, staying.embeddings)) - same
            kept_loss = config.retain_weight * average_error(moved, config.loss) / mean.to(moved)
            value = float(loss.detach()) + float(kept_loss.detach())
            loss = kept_loss if away else loss + kept_loss
            if diverged([*losses, value]):
                warn_diverged(step, bool(sound), "the edit")
                for weights, before in zip(trained.values, sound, strict=True):
                    weights.copy_(before)
                break
            if step and step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                sound = [value.clone() for value in trained.values]
            losses.append(value)
            gradients = trained.gradients(loss)
            if away:
                gradients = [one + other for one, other in zip(gradients, away, strict=True)]
            for weights, gradient in zip(trained.values, gradients, strict=True):
                weights.grad = gradient
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * (1 - step / config.max_train_steps)
            optimiser.step()
            optimiser.zero_grad()
            trained.write()
            user.step()
            attacks.renew()
            if len(losses) % KEEP_EVERY == 0:
                run.save_checkpoint("fortifying", _state(trained, optimiser, attacks, user, losses))
        return _changes(trained)


class Attacks:
    """Attacks that go on side by side, each on one concept, from the prompt of another word."""

    words: Tensor
    targets: int
    config: FortifyConfig
    generator: torch.Generator

    def __init__(
        self, words: Tensor, targets: int, config: FortifyConfig, generator: torch.Generator
    ) -> None:
        """Begin all attacks.

        Args:
            words: the prompts to start from, (n, tokens, d).
            targets: how many concepts there are.
            config: how many attacks, and how they move.
            generator: chooses prompts and concepts.
        """
        self.words, self.targets, self.config, self.generator = words, targets, config, generator
        n = config.n_attacks
        self.begun: Tensor = torch.zeros(n, dtype=torch.int64)
        """The prompt that each began at."""
        self.owner: Tensor = torch.zeros(n, dtype=torch.int64)
        """The concept that each is after."""
        self.moves: Tensor = torch.full((n,), config.max_attack_steps)
        """How often each has moved."""
        self.shift: Tensor = torch.zeros(n, *words.shape[1:]).to(words)
        """(attacks, tokens, d), how far each has moved."""
        self.renew()

    @property
    def start(self) -> Tensor:
        """(attacks, tokens, d), where each began."""
        return self.words[self.begun]

    def move(self, rows: Tensor, gradient: Tensor) -> None:
        """Move some attacks one step down, every token within its ball.

        Args:
            rows: which attacks, (n,).
            gradient: of what they minimise, (n, tokens, d).
        """
        reach = self.config.radius * self.start[rows].norm(dim=-1, keepdim=True)
        self.shift[rows] = step_in_ball(
            self.shift[rows].detach(), gradient, self.config.attack_step * reach, reach
        )
        self.moves[rows] += 1

    def renew(self) -> None:
        """Let attacks that have moved enough begin anew."""
        old = (self.moves >= self.config.max_attack_steps).nonzero()[:, 0]
        self.begun[old] = torch.randint(len(self.words), (len(old),), generator=self.generator)
        self.owner[old] = torch.randint(self.targets, (len(old),), generator=self.generator)
        self.shift[old], self.moves[old] = 0, 0


@torch.no_grad()
def _measure_distances(model: Model, target: FortifyTarget, generator: torch.Generator) -> Tensor:
    """Estimate E ‖ε₀(z_t, t, e) − ε₀(z_t, t, e_anchor)‖², a mean over entries, for every t: (T,).

    Args:
        model: the original.
        target: the concept, its anchor and its images.
        generator: draws images and noise.
    """
    levels = len(model.log_snr())
    t = torch.arange(LEVELS) * levels // LEVELS + levels // (2 * LEVELS)
    squares = []
    for _ in range(DRAWS):
        # Another image at each timestep: the mean over images is what counts, not its noise.
        some = torch.randint(len(target.latents), (LEVELS,), generator=generator)
        noise = torch.randn(target.latents[some].shape, generator=generator).to(target.latents)
        z = model.add_noise(target.latents[some], noise, t.to(noise.device))
        one, other = (
            model.predict(z, t.to(z.device), text[[0] * LEVELS]) for text in (target.text, target.anchor)
        )
        squares.append((one - other).float().square().mean((1, 2, 3)).cpu())
    found = torch.stack(squares).mean(0)
    # Where an image is all but clean nothing is left to tell, and the smallest noise would count most.
    found = found.clamp(min=1e-3 * float(found.max()))
    # Distances span orders of magnitude over timesteps, so that their logarithms are interpolated.
    return interpolate(found.log()[None, None], levels, mode="linear")[0, 0].exp()


def _state(
    trained: InPlace,
    optimiser: torch.optim.Optimizer,
    attacks: Attacks,
    user: Trainer,
    losses: Sequence[float],
) -> Tensors:
    """Gather everything that training resumes from.

    Args:
        trained: the weights.
        optimiser: Adam.
        attacks: the attacks under way.
        user: who trains meanwhile.
        losses: of the steps so far.
    """
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "numbers": attacks.generator.get_state(),
        **{name: getattr(attacks, name) for name in ("begun", "owner", "moves", "shift")},
        **trained.state(optimiser),
        **user.state(),
    }


def _resumed(
    run: RunContext,
    trained: InPlace,
    optimiser: torch.optim.Optimizer,
    attacks: Attacks,
    user: Trainer,
) -> tuple[int, list[float]]:
    """Resume from the state that was saved, if any.

    Args:
        run: where states are saved.
        trained: takes up the weights.
        optimiser: takes up its state.
        attacks: take up where each is.
        user: takes up where it is.

    Returns:
        How many steps were done, and their losses.
    """
    state = run.checkpoint("fortifying")
    if state is None:
        return 0, []
    trained.resume(optimiser, state)
    for name in ("begun", "owner", "moves", "shift"):
        getattr(attacks, name).copy_(state[name])
    user.resume(state)
    attacks.generator.set_state(state["numbers"])
    losses = state["losses"].tolist()
    return len(losses), losses


def _changes(trained: InPlace) -> Changes:
    """Make a dense change of each parameter."""
    changes = []
    for name, value in zip(trained.parameters, trained.values, strict=True):
        layer, _, parameter = name.rpartition(".")
        original = trained.parameters[name].detach()
        whole = value.detach().to(original.dtype).reshape(original.shape).cpu().clone()
        changes.append(Dense((layer,), whole, parameter=parameter))
    return tuple(changes)
