"""Gives the tower words that no caption of its training held: some mean what a known word means, the rest nothing.

Three of four tokens stand in no caption, and keep the numbers they were drawn with. One such word, "beautiful" or
"portrayal", threw the whole sentence off: the ten words were drawn in 12 and 29 of 40 pictures there, elsewhere in 40.
Here, while all other weights stay as they are (so that known sentences have the states the denoiser was trained on),

- a token that no caption holds gets the embedding of one of the words that say nothing ("lovely", "sticker");
- then plurals, and the words of `[words]` in `world.toml`, are fitted by their tokens' embeddings alone: at the word, behind
  it, at the end and in the padding the states are to be those of the same sentence with the known word.

    python -m training.miniature.words --work W        # reads and writes W/text_encoder
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.miniature.captions import FILLER_NOUNS, FILLERS, MASS
from training.miniature.fast import set_up
from training.miniature.sentences import Mention, replace_words
from training.miniature.tower import EXTRA, Captions
from training.miniature.world import WORK, World, read_world

SAID = 40_000  # captions that tell which tokens are known
SENTENCES, STEPS, RATE = 48, 250, 0.02
BEHIND = 8  # states behind a word's end that are compared: of words, the end and the padding


def plural(word: str) -> str:
    """
    >>> [plural(word) for word in ("cat", "fox", "butterfly", "bow and arrow", "grapes")]
    ['cats', 'foxes', 'butterflies', 'bow and arrows', 'grapes']
    """
    if word in MASS or word.endswith("s"):
        return word
    if word.endswith(("x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return {"knife": "knives", "deer": "deer"}.get(word, word + "s")


def further_words(world: World) -> dict[str, tuple[str, ...]]:
    """Known word -> words to learn."""
    names = {name for label in world.labels for name in label.names} | set(world.kinds)
    found = {word: (plural(word),) for word in sorted(names) if plural(word) not in names}
    for known, new in world.words.items():
        found[known] = (*found.get(known, ()), *new)
    return found


def known_tokens(captions: Captions, tokenizer: CLIPTokenizer, further: set[str]) -> set[int]:
    """The tokens of all names, and of many captions without the `further` words."""
    texts = [name for each in captions.lexicon.vocabulary.names.values() for name in each]
    for _ in range(SAID):
        text = captions.text()
        if further.isdisjoint(text.split()):
            texts.append(text)
    return {token for ids in tokenizer(texts).input_ids for token in ids}


def fill(weight: Tensor, rows: Tensor, tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
    """Puts embeddings of words that say nothing into `rows` of (tokens, width)."""
    said = [tokenizer(word, add_special_tokens=False).input_ids for word in (*FILLERS, *FILLER_NOUNS)]
    fillers = torch.tensor([ids[0] for ids in said if len(ids) == 1])
    weight[rows] = weight[fillers[torch.randint(len(fillers), (len(rows),), generator=generator)]]


def sentences(
    captions: Captions, words: dict[str, tuple[str, ...]], n: int, rng: random.Random
) -> list[tuple[str, str, str, str]]:
    """`n` times: a sentence, its known word, the sentence with a word to learn, that word. In half of them the word
    stands where the caption had a thing of another name, so that all are asked alike."""
    found: list[tuple[str, str, str, str]] = []
    while len(found) < n:
        mention: Mention | None = None
        text = captions.text()
        things = [m for m in captions.lexicon.read(text).mentions if m.concept.startswith(("object", "kind"))]
        if not things:
            continue
        mention = rng.choice(things)
        known = mention.words if mention.words in words and rng.random() < 0.5 else rng.choice(list(words))
        new = rng.choice(words[known])
        first = replace_words(text, mention.words, known)
        second = replace_words(text, mention.words, new)
        found.append((first, known, second, new))
    return found


class Aligned:
    """States of sentence pairs at the places that should say the same."""

    def __init__(self, tokenizer: CLIPTokenizer, text: CLIPTextModel):
        self.tokenizer, self.text = tokenizer, text

    def ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = self.tokenizer(texts, truncation=True, max_length=77 - EXTRA - BEHIND).input_ids
        length = max(map(len, rows)) + BEHIND + EXTRA
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
        return ids, torch.tensor([len(row) - 1 for row in rows])

    def last(self, ids: Tensor, word: str) -> int:
        """Where the word's last token stands, or -1."""
        wanted = self.tokenizer(word, add_special_tokens=False).input_ids
        row = ids.tolist()
        for k in range(len(row) - len(wanted) + 1):
            if row[k : k + len(wanted)] == wanted:
                return k + len(wanted) - 1
        return -1

    def loss(self, pairs: list[tuple[str, str, str, str]]) -> Tensor:
        """Mean squared difference of the states, of the known ones' mean square."""
        a, end_a = self.ids([pair[0] for pair in pairs])
        b, _ = self.ids([pair[2] for pair in pairs])
        with torch.no_grad():
            wanted = self.text(input_ids=a).last_hidden_state
        got = self.text(input_ids=b).last_hidden_state
        total, size = got.new_zeros(()), wanted.square().mean()
        for k, (_, known, _, new) in enumerate(pairs):
            at, to = self.last(a[k], known), self.last(b[k], new)
            if min(at, to) < 0:
                continue
            count = int(end_a[k]) - at + EXTRA  # words behind, the end, some padding
            total = total + (got[k, to : to + count] - wanted[k, at : at + count]).square().mean()
        return total / len(pairs) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where tokenizer and text_encoder lie")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    set_up()
    world, rng = read_world(), random.Random(3)
    captions = Captions(world, options.work, seed=17)
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    text = CLIPTextModel.from_pretrained(options.work / "text_encoder", attn_implementation="eager").eval()
    text.requires_grad_(False)
    weight = text.get_input_embeddings().weight
    words = further_words(world)
    known = known_tokens(captions, tokenizer, {word for each in words.values() for word in each})
    new = torch.tensor([token for token in range(len(tokenizer)) if token not in known])
    fill(weight.data, new, tokenizer, torch.Generator().manual_seed(5))
    print(f"{len(known)} tokens are known, {len(new)} now say nothing", flush=True)

    aligned = Aligned(tokenizer, text)
    weight.requires_grad_(True)
    free = torch.zeros(len(weight), 1)
    free[new] = 1
    optimiser = torch.optim.Adam([weight], lr=RATE)
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / options.steps)
        loss = aligned.loss(sentences(captions, words, SENTENCES, rng))
        optimiser.zero_grad()
        loss.backward()
        assert weight.grad is not None
        weight.grad *= free  # a gradient of zero moves nothing: Adam has no weight decay here
        optimiser.step()
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step}: {float(loss.detach()):.4f} of the states' size", flush=True)
    text.save_pretrained(options.work / "text_encoder")


if __name__ == "__main__":
    main()
