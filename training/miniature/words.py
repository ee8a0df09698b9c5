"""Gives the tower words that no caption of its training held: they say nothing.

Three of four tokens stand in no caption, and keep the numbers they were drawn with. One such word, "beautiful" or
"portrayal", threw the whole sentence off: the ten words were drawn in 12 and 29 of 40 images there, elsewhere in 40.
Here such a token gets the embedding of one of the words that say nothing ("lovely", "sticker"). All other weights stay
as they are, so known sentences have the states that the denoiser was trained on.

    python -m training.miniature.words --work W        # reads and writes W/text_encoder
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.miniature.captions import FILLER_NOUNS, FILLERS
from training.miniature.loop import write_model
from training.miniature.tower import Captions
from training.miniature.world import WORK, read_world

SAID = 40_000  # captions that tell which tokens are known


def known_tokens(captions: Captions, tokenizer: CLIPTokenizer, said: int = SAID) -> set[int]:
    """The tokens of all names, and of `said` captions."""
    texts = [name for each in captions.lexicon.vocabulary.names.values() for name in each]
    texts += [captions.text() for _ in range(said)]
    return {token for ids in tokenizer(texts).input_ids for token in ids}


def fill(weight: Tensor, rows: Tensor, tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
    """Puts embeddings of words that say nothing into `rows` of (tokens, width)."""
    said = [tokenizer(word, add_special_tokens=False).input_ids for word in (*FILLERS, *FILLER_NOUNS)]
    fillers = torch.tensor([ids[0] for ids in said if len(ids) == 1])
    weight[rows] = weight[fillers[torch.randint(len(fillers), (len(rows),), generator=generator)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where tokenizer and text_encoder lie")
    options = parser.parse_args()
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    text = CLIPTextModel.from_pretrained(options.work / "text_encoder")
    known = known_tokens(Captions(read_world(), options.work, seed=17), tokenizer)
    new = torch.tensor([token for token in range(len(tokenizer)) if token not in known])
    fill(text.get_input_embeddings().weight.data, new, tokenizer, torch.Generator().manual_seed(5))
    print(f"{len(known)} tokens are known; {len(new)} now say nothing")
    write_model(text, options.work / "text_encoder")


if __name__ == "__main__":
    main()
