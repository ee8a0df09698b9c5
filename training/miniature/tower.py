"""The text tower: a CLIPTextModel whose states keep their own word, and whose end state knows the sentence.

In a tower trained on a contrastive loss alone every state behind a word comes to say the same as the word, and a
matrix fitted on one undoes the other. Here beside that loss

- every state names its own token, and the next;
- a concept's shift (the difference of two captions' states that differ in one concept) at its own words, and at the
  end and the padding, do not point the same way;
- words behind the concept move little;
- the last of a concept's own words names the concept, whichever of its names was used.

    python -m training.miniature.tower --minutes 25 --work /where/it/lies
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.miniature.captions import caption
from training.miniature.drawings import load_drawings
from training.miniature.fast import autocast, has_bfloat16, set_up
from training.miniature.loop import Notes, Schedule, join, stage_parser, train, write_model
from training.miniature.muon import Muon
from training.miniature.scenes import SceneMaker
from training.miniature.sentences import Codes, Pair, Spans, Vocabulary, lexicon_of, pair_of
from training.miniature.tokenizer import save, train_tokenizer
from training.miniature.world import World, read_world

GENERAL = Path("src/expunge/captions/general.txt")  # sentences about everyday photographs
WIDTH, LAYERS, INNER, POSITIONS = 512, 6, 1024, 77
SHARED = 256  # numbers of the vector that the end state is matched to
WEIGHTS = {"own": 0.5, "next": 0.3, "apart": 2.0, "behind": 2.0, "concept": 0.5, "synonym": 0.3}
BEHIND = 0.2  # how far the words behind may move for nothing, as a share of their norm
ASKED = 1 / 3  # of the states have to name tokens in a step
EXTRA = 6  # states of padding that are looked at


def build(tokenizer: CLIPTokenizer, *, width: int = WIDTH, layers: int = LAYERS, inner: int = INNER) -> CLIPTextModel:
    """An untrained tower for the tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=POSITIONS,
        projection_dim=SHARED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # two products and a softmax: faster than SDPA to train on a CPU
    )
    return CLIPTextModel(config)


@dataclass
class Batch:
    """`n` pairs as the tower reads them: rows 0 to n-1 are the first captions, n to 2n-1 their partners."""

    ids: Tensor  # (2n, length)
    end: Tensor  # (2n,) where the end token stands
    first: Tensor  # (2n,) the first of the mention's own tokens; 0 where there is none
    last: Tensor  # (2n,) the last of them
    target: Tensor  # (2n, SHARED) what the end state is matched to
    concept: Tensor  # (2n,) the mentioned concept's place in the vocabulary; -1: none
    differs: Tensor  # (n,) bool: the pair's concepts differ
    synonym: Tensor  # (n,) bool: two names of one concept


class Reader:
    """Turns pairs into batches."""

    def __init__(self, tokenizer: CLIPTokenizer, vocabulary: Vocabulary):
        self.tokenizer, self.spans, self.codes = tokenizer, Spans(tokenizer), Codes(SHARED)
        self.place = {concept: k for k, concept in enumerate(vocabulary.concepts())}

    def __call__(self, pairs: Sequence[Pair], length: int | None = None) -> Batch:
        """`length`: tokens of a row; none: the longest caption's and some padding."""
        sentences = [pair.first for pair in pairs] + [pair.second for pair in pairs]
        rows = self.tokenizer([s.text for s in sentences], truncation=True, max_length=POSITIONS).input_ids
        length = length or min(max(map(len, rows)) + EXTRA, POSITIONS)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        first, last, concept = (torch.zeros(len(rows), dtype=torch.long) for _ in range(3))
        concept -= 1
        for k, (row, sentence) in enumerate(zip(rows, sentences, strict=True)):
            ids[k, : len(row)] = torch.tensor(row)
            at = pairs[k % len(pairs)].at
            found = None if at < 0 else self.spans.find(row, sentence.mentions[at].words)
            if found:
                first[k], last[k] = found[0], found[1] - 1
                concept[k] = self.place.get(sentence.mentions[at].concept, -1)
        end = torch.tensor([len(row) - 1 for row in rows])
        named = (first > 0).view(2, -1).all(0) & ((end - last).view(2, -1).diff(dim=0)[0] == 0)
        same = torch.tensor([pair.same for pair in pairs])
        moved = torch.tensor([pair.first.text != pair.second.text for pair in pairs])
        target = self.codes([sentence.facts for sentence in sentences])
        return Batch(ids, end, first, last, target, concept, named & ~same, named & same & moved)


class Tower(nn.Module):
    """The text model with the heads that only training needs."""

    def __init__(self, text: CLIPTextModel, concepts: int):
        super().__init__()
        width, tokens = text.config.hidden_size, text.config.vocab_size
        self.text = text
        self.own, self.next = nn.Linear(width, tokens), nn.Linear(width, tokens)
        self.sentence = nn.Linear(width, SHARED)
        self.concept = nn.Linear(width, concepts)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, batch: Batch) -> tuple[Tensor, Notes]:
        """The loss, and its parts."""
        with autocast():
            states = self.states(batch.ids)
            parts = self.token_losses(states, batch)
            end = self.sentence(states[torch.arange(len(states)), batch.end])
            concept = self.concept(states[torch.arange(len(states)), batch.last])
        pairs, accuracy = matching(end.float(), batch.target, self.scale.exp())
        parts["concept"] = F.cross_entropy(concept.float(), batch.concept, ignore_index=-1)
        shifts = Shifts.of(states.float(), batch)
        parts |= {
            "apart": shifts.alignment(),
            "behind": shifts.behind_loss(),
            "synonym": shifts.synonym_loss(),
        }
        loss = pairs + sum(WEIGHTS[name] * part for name, part in parts.items())
        notes: Notes = {"pairs": pairs.detach(), "accuracy": accuracy}
        return loss, notes | {name: part.detach() for name, part in parts.items()} | shifts.notes()

    def states(self, ids: Tensor) -> Tensor:
        """(n, length, width), wholly in bfloat16 where the machine has it: no conversions on the way."""
        if not has_bfloat16():
            return self.text(input_ids=ids).last_hidden_state
        weights = {name: weight.bfloat16() for name, weight in self.text.named_parameters()}
        with autocast(False):
            return functional_call(self.text, weights, (), {"input_ids": ids}).last_hidden_state

    def token_losses(self, states: Tensor, batch: Batch) -> dict[str, Tensor]:
        """A state of the sentence, the end's included, names its own token and the next; asked of a third of them."""
        place = torch.arange(batch.ids.shape[1])
        asked = torch.rand(batch.ids.shape) < ASKED
        inside = (place <= batch.end[:, None]) & asked
        before = (place[:-1] < batch.end[:, None]) & asked[:, :-1]
        return {
            "own": F.cross_entropy(self.own(states[inside]).float(), batch.ids[inside]),
            "next": F.cross_entropy(self.next(states[:, :-1][before]).float(), batch.ids[:, 1:][before]),
        }


def matching(end: Tensor, target: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """The contrastive loss of (n, width) against their targets, and its accuracy; equal targets count neither way."""
    logits = scale * F.normalize(end, dim=1) @ target.T
    same = (target @ target.T > 0.999) & ~torch.eye(len(target), dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    own = torch.arange(len(target))
    return F.cross_entropy(logits, own), (logits.argmax(1) == own).float().mean()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


@dataclass
class Shifts:
    """How far the states of n pairs are apart: at the concept's words, behind them, at the end and in the padding."""

    word: Tensor  # (n, width) the last of the concept's own words
    begin: Tensor  # (n, width) the first of them
    end: Tensor  # (n, width)
    padding: Tensor  # (n, width) at one place behind the end, drawn for each pair
    behind: Tensor  # (m,) of every word behind a concept: the shift as a share of the state's norm
    synonym: Tensor  # (k,) the same at the concept's last word, where two names of it differ

    @classmethod
    def of(cls, states: Tensor, batch: Batch) -> Shifts:
        n, length = len(batch.differs), states.shape[1]
        rows = torch.arange(n)
        a, b = states[:n], states[n:]

        def shift(at: Tensor) -> Tensor:
            return a[rows, at[:n]] - b[rows, at[n:]]

        ahead = 1 + (torch.rand(n) * (length - 1 - batch.end.view(2, -1).amax(0)).clamp(min=1)).long()
        padding = (batch.end + ahead.repeat(2)).clamp(max=length - 1)
        word = shift(batch.last)
        norm = a[rows, batch.last[:n]].norm(dim=1)
        back = torch.arange(1, length)[None]  # places before the end
        inside = (back < (batch.end - batch.last)[:n, None]) & batch.differs[:, None]
        pair, back = inside.nonzero(as_tuple=True)[0], back.expand(n, -1)[inside]
        of_a = a[pair, batch.end[:n][pair] - back]
        behind = (of_a - b[pair, batch.end[n:][pair] - back]).norm(dim=1) / of_a.norm(dim=1)
        keep = batch.differs
        return cls(
            word[keep],
            shift(batch.first)[keep],
            shift(batch.end)[keep],
            shift(padding)[keep],
            behind,
            (word.norm(dim=1) / norm)[batch.synonym],
        )

    def alignment(self) -> Tensor:
        """The mean squared cosine of a concept's shift at its words with its own, and with any other concept's, at the
        end and in the padding: not one direction only, the spaces are to be apart."""
        total = self.word.new_zeros(())
        if len(self.word) < 2:
            return total
        for word in (self.word, self.begin):
            for other in (self.end, self.padding):
                squares = cosines(word, other).square()
                total = total + squares.diagonal().mean() + 4 * squares.mean()
        return total / 4

    def behind_loss(self) -> Tensor:
        return (self.behind - BEHIND).clamp(min=0).square().mean() if len(self.behind) else self.word.new_zeros(())

    def synonym_loss(self) -> Tensor:
        return self.synonym.square().mean() if len(self.synonym) else self.word.new_zeros(())

    @torch.no_grad()
    def notes(self) -> Notes:
        """What the gates measure, of this batch."""
        if len(self.word) < 2 or not len(self.behind):
            return {}
        return {
            "word-end": F.cosine_similarity(self.word, self.end).abs().mean(),
            "word-pad": F.cosine_similarity(self.word, self.padding).abs().mean(),
            "end-pad": F.cosine_similarity(self.end, self.padding).mean(),
            "|behind|": self.behind.mean(),
            "|word|": self.word.norm(dim=1).mean(),
            "|end|": self.end.norm(dim=1).mean(),
        }


# -- training ------------------------------------------------------------------------------------------------------------


class Captions:
    """Sentences without end: scenes are thought up, but not painted."""

    def __init__(self, world: World, work: Path, seed: int):
        self.maker = SceneMaker(world, load_drawings(world, work), seed)
        self.world, self.lexicon, self.rng = world, lexicon_of(world), random.Random(seed)

    def text(self) -> str:
        return caption(self.maker.structure(), self.rng, self.world)

    def pairs(self, n: int) -> list[Pair]:
        """`n` pairs; a name alone, without a sentence around it, is one in twelve."""
        found = []
        for _ in range(n):
            text = self.text()
            if self.rng.random() < 1 / 12:
                names = self.lexicon.vocabulary.names
                text = self.rng.choice(names[self.rng.choice(list(names))])
            found.append(pair_of(self.lexicon.read(text), self.lexicon.vocabulary, self.rng))
        return found

    def reseed(self, seed: int) -> None:
        self.rng.seed(seed)
        self.maker.rng.seed(seed + 1)


def make_tokenizer(captions: Captions) -> CLIPTokenizer:
    """Trained on captions, on every name of the world many times, and on sentences about anything."""
    texts = [captions.text() for _ in range(20_000)]
    names = [name for each in captions.lexicon.vocabulary.names.values() for name in each]
    return train_tokenizer([*texts, *names * 50, *GENERAL.read_text(encoding="utf-8").splitlines()])


def main() -> None:
    parser = stage_parser(__doc__, "tower", minutes=30)
    parser.add_argument("--pairs", type=int, default=48, help="pairs of captions a step and process")
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(join())
    set_up()
    captions = Captions(read_world(), options.work, seed=11)
    folder = options.work / "tokenizer"
    if not (folder / "vocab.json").exists():
        save(make_tokenizer(captions), folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    reader = Reader(tokenizer, captions.lexicon.vocabulary)
    tower = Tower(build(tokenizer), len(reader.place))

    def loss_of(step: int) -> tuple[Tensor, Notes]:
        captions.reseed(torch.initial_seed())
        return tower(reader(captions.pairs(options.pairs), POSITIONS if step % 8 == 7 else None))

    optimiser = Muon(tower, options.rate, adamw=("embedding", "own", "next", "concept", "sentence"))
    schedule = Schedule(options.rate, 50, options.minutes if options.anneal else None)
    weights = train(
        options.name,
        tower,
        loss_of,
        options.work,
        optimiser,
        schedule,
        minutes=options.minutes,
        start=options.initial,
        average=0.99,
    )
    if join() == 0:
        tower.load_state_dict(weights)
        write_model(tower.text, options.work / "text_encoder")


if __name__ == "__main__":
    main()
