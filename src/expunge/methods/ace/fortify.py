"""Cross-attentions trained until no text calls a concept back, the third stage of ACE.

Gates close a region of text space. A word that is learnt against them stands outside that region, and
the cross-attentions read the concept from it all the same. So here they are trained, against attacks
that start at the prompts of other words and may go nearly anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.changes import Changes, Dense, Gated
from expunge.erasing.guidance_training import part_of
from expunge.model import Model
from expunge.ops.finetune import KEEP_EVERY, broke_off, diverged, frozen
from expunge.ops.in_place import InPlace
from expunge.ops.pgd import stepped
from expunge.runtime.context import RunContext, Tensors
from expunge.text import Text

LEVELS, DRAWS = 24, 4
"""At how many times, evenly spaced, concept and anchor are compared, and with how many noises."""

POOL, BATCH, AGE = 16, 8, 40
"""How many attacks go on at a time, how many a step takes at most, and how many moves each has."""

STRIDE = 0.1
"""How far an attack moves at once, as a share of its bound."""

ELSEWHERE = 0.3
"""The share of what is held for which the noisy images are the concept's."""


@dataclass(frozen=True, eq=False)
class Target:
    """A concept that must not come back."""

    name: str
    text: Text
    """(1,), its prompt."""
    anchor: Text
    """(1,), its anchor's."""
    latents: Tensor
    """(n, c, h, w), images of it."""


@dataclass(frozen=True, eq=False)
class Held:
    """What must stay."""

    text: Text
    """(n,) prompts."""
    latents: Tensor
    """(n, c, h, w), an image of each."""
    words: Text
    """(m,) prompts of other words; attacks start at them, too."""


def fortify(
    model: Model,
    gates: Gated,
    targets: Sequence[Target],
    held: Held,
    run: RunContext,
    *,
    max_train_steps: int,
    learning_rate: float,
    radius: float,
    noisiest: float,
    retain_weight: float,
) -> Changes:
    """Train the cross-attentions, behind the gates: their new weights.

        inner   min_δ ‖ε(z_t, t, ẽ(r + δ)) − ε₀(z_t, t, e)‖²,    ‖δ_token‖ ≤ radius ‖r_token‖
        outer   min E ‖ε(z_t, t, ẽ(r + δ)) − ε₀(z_t, t, e_anchor)‖² / a_t
                    + ρ ‖ε(y_t, t, ẽ(h)) − ε₀(y_t, t, h)‖² / a

    z_t are noisy images of the concept, r other words' prompts, ẽ the gates, h what is held, y_t
    images of it and, in part, of the concept or of another; a_t is how far apart the original's
    predictions for concept and anchor are at that time, a its mean over time. t is drawn from the
    noisiest times, where it is decided what an image shows. An attack makes one move a step, on the
    weights as they are then, and after some moves begins at another word.

    Nothing is learnt of words as textual inversion learns them: an attack moves the tokens of a prompt
    behind the text encoder, each within its ball.

    Args:
        model: the original.
        gates: the closed form, hardened or not; not changed.
        targets: the concepts.
        held: what stays.
        run: its seed; the state is kept in its folder, and taken up again.
        max_train_steps: of the outer, in all.
        learning_rate: Adam's learning rate at first; it falls evenly to nothing.
        radius: of the attacks, a share of each token's norm.
        noisiest: the share of all times, from pure noise on, that t is drawn from; h is held at all.
        retain_weight: ρ.

    Raises:
        ExpungeError: the model has no cross-attentions, or the loss runs away at once.

    Source: ours; the two problems in turns are Madry et al., ICLR 2018, arXiv 1706.06083, attacks that
    go on from step to step are after Shafahi et al., NeurIPS 2019, arXiv 1904.12843.
    """
    generator = run.generator("fortifying", *(target.name for target in targets))
    levels = len(model.log_snr())
    apart = [_apart(model, target, generator) for target in targets]
    mean = torch.stack(apart).mean()
    attacks = Attacks(held.words.embeddings, len(targets), radius, generator)
    every = torch.cat([held.latents, *(target.latents for target in targets)])
    own = torch.cat([target.latents for target in targets])
    trained = InPlace(part_of(model, "cross-attention"))
    optimiser = torch.optim.Adam(trained.values, lr=learning_rate, foreach=False)
    start, losses = _resumed(run, trained, optimiser, attacks)
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
        for step in range(start, max_train_steps):
            run.progress("fortifying", step, max_train_steps)
            rows = below(POOL, BATCH).unique()
            whose = attacks.owner[rows].tolist()
            here = [targets[i] for i in whose]
            t = levels - 1 - below(max(1, int(noisiest * levels)), len(rows))
            z = noisy(torch.stack([x.latents[int(below(len(x.latents), 1))] for x in here]), t)
            weigh = torch.stack([1 / apart[i][at] for i, at in zip(whose, t.tolist(), strict=True)]).to(
                z
            )
            kept = below(len(held.text), BATCH).tolist()
            words = below(len(held.words), BATCH).tolist()
            many = int(2 * BATCH * ELSEWHERE)
            shown = torch.cat([
                held.latents[kept],
                every[below(len(every), BATCH - many)],
                own[below(len(own), many)],
            ])  # fmt: skip
            at = below(levels, len(shown))
            y = noisy(shown, at)
            staying = Text.joined([held.text[kept], held.words[words]])
            with trained.off(), torch.no_grad():
                concept = predict(z, t, Text.joined([x.text for x in here]))
                anchor = predict(z, t, Text.joined([x.anchor for x in here]))
                same = predict(y, at, staying)
            prompts = held.words[[0] * len(rows)]
            shift = attacks.shift[rows].requires_grad_()
            begun = attacks.start[rows]
            near = (predict(z, t, gated(prompts, begun + shift)) - concept).square().mean((1, 2, 3))
            (gradient,) = torch.autograd.grad((near * weigh).sum(), shift)
            attacks.move(rows, gradient)
            found = predict(z, t, gated(prompts, begun + attacks.shift[rows]))
            loss = ((found - anchor).square().mean((1, 2, 3)) * weigh).mean()
            kept_loss = (predict(y, at, gated(staying, staying.embeddings)) - same).square().mean()
            loss = loss + retain_weight * kept_loss / mean.to(kept_loss)
            if diverged([*losses, float(loss.detach())]):
                broke_off(step, bool(sound), "the edit")
                for value, before in zip(trained.values, sound, strict=True):
                    value.copy_(before)
                break
            if step and step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                sound = [value.clone() for value in trained.values]
            losses.append(float(loss.detach()))
            for value, found_gradient in zip(trained.values, trained.gradients(loss), strict=True):
                value.grad = found_gradient
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * (1 - step / max_train_steps)
            optimiser.step()
            optimiser.zero_grad()
            trained.write()
            attacks.renew()
            if len(losses) % KEEP_EVERY == 0:
                run.save_checkpoint("fortifying", _state(trained, optimiser, attacks, losses))
        return _changes(trained)


class Attacks:
    """Attacks that go on side by side, each on one concept, from the prompt of another word."""

    def __init__(self, words: Tensor, targets: int, radius: float, generator: torch.Generator) -> None:
        """`POOL` of them, on `targets` concepts, from prompts (n, tokens, d)."""
        self.words, self.targets, self.radius, self.generator = words, targets, radius, generator
        self.begun = torch.zeros(POOL, dtype=torch.int64)
        """The prompt that each began at."""
        self.owner = torch.zeros(POOL, dtype=torch.int64)
        """The concept that each is after."""
        self.moves = torch.full((POOL,), AGE)
        self.shift = torch.zeros(POOL, *words.shape[1:]).to(words)
        """(`POOL`, tokens, d), where each has come."""
        self.renew()

    @property
    def start(self) -> Tensor:
        """(`POOL`, tokens, d), where each began."""
        return self.words[self.begun]

    def move(self, rows: Tensor, gradient: Tensor) -> None:
        """Take some of them one step down, every token within its ball."""
        reach = self.radius * self.start[rows].norm(dim=-1, keepdim=True)
        self.shift[rows] = stepped(self.shift[rows].detach(), gradient, STRIDE * reach, reach)
        self.moves[rows] += 1

    def renew(self) -> None:
        """Let those that have moved enough begin anew."""
        old = (self.moves >= AGE).nonzero()[:, 0]
        self.begun[old] = torch.randint(len(self.words), (len(old),), generator=self.generator)
        self.owner[old] = torch.randint(self.targets, (len(old),), generator=self.generator)
        self.shift[old], self.moves[old] = 0, 0


@torch.no_grad()
def _apart(model: Model, target: Target, generator: torch.Generator) -> Tensor:
    """E ‖ε₀(z_t, t, e) − ε₀(z_t, t, e_anchor)‖², a number's mean, for every t: (levels,)."""
    levels = len(model.log_snr())
    t = torch.arange(LEVELS) * levels // LEVELS + levels // (2 * LEVELS)
    squares = []
    for _ in range(DRAWS):
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
    return interpolate(found.log()[None, None], levels, mode="linear")[0, 0].exp()


def _state(
    trained: InPlace, optimiser: torch.optim.Optimizer, attacks: Attacks, losses: Sequence[float]
) -> Tensors:
    """Everything that training goes on from."""
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "numbers": attacks.generator.get_state(),
        **{name: getattr(attacks, name) for name in ("begun", "owner", "moves", "shift")},
        **trained.state(optimiser),
    }


def _resumed(
    run: RunContext, trained: InPlace, optimiser: torch.optim.Optimizer, attacks: Attacks
) -> tuple[int, list[float]]:
    """Take up the state that was kept, if any: the steps done, and their losses."""
    state = run.checkpoint("fortifying")
    if state is None:
        return 0, []
    trained.go_on(optimiser, state)
    for name in ("begun", "owner", "moves", "shift"):
        getattr(attacks, name).copy_(state[name])
    attacks.generator.set_state(state["numbers"])
    losses = state["losses"].tolist()
    return len(losses), losses


def _changes(trained: InPlace) -> Changes:
    """A dense change of each parameter."""
    changes = []
    for name, value in zip(trained.parameters, trained.values, strict=True):
        layer, _, parameter = name.rpartition(".")
        original = trained.parameters[name].detach()
        whole = value.detach().to(original.dtype).reshape(original.shape).cpu().clone()
        changes.append(Dense((layer,), whole, parameter=parameter))
    return tuple(changes)
