"""Words that no caption of the tower's training held: they say nothing."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from expunge.miniature import recogniser
from training.miniature.captions import FILLER_NOUNS, FILLERS, caption, is_held_out
from training.miniature.sentences import lexicon_of
from training.miniature.words import fill, known_tokens
from training.miniature.world import read_world

FOLDER = Path(recogniser.__file__).parent / "pipeline"
WORLD = read_world()


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(FOLDER, subfolder="tokenizer")


@pytest.fixture(scope="module")
def tower() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(FOLDER, subfolder="text_encoder").eval()


def test_tokens_of_captions_and_names_are_known(tokenizer: CLIPTokenizer) -> None:
    told = SimpleNamespace(lexicon=lexicon_of(WORLD), text=lambda: "a vivid picture of a cat")
    known = known_tokens(told, tokenizer, said=1)
    cat, vivid, war = (
        set(tokenizer(word, add_special_tokens=False).input_ids) for word in ("cat", "vivid", "lovely")
    )
    assert cat | vivid <= known
    assert not war & known


def test_unknown_tokens_get_words_that_say_nothing(tokenizer: CLIPTokenizer) -> None:
    before = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    after, rows = before.clone(), torch.tensor([3, 5, 700])
    fill(after, rows, tokenizer, torch.Generator().manual_seed(1))
    moved = (after != before).any(1).nonzero()[:, 0]
    assert moved.tolist() == rows.tolist()
    said = {tokenizer(word, add_special_tokens=False).input_ids[0] for word in (*FILLERS, *FILLER_NOUNS)}
    assert all(any(torch.equal(after[row], before[token]) for token in said) for row in rows)


def states(tower: CLIPTextModel, tokenizer: CLIPTokenizer, text: str) -> Tensor:
    """(2, width): of the last word, and of the padding."""
    ids = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
    end = int((ids[0] == tokenizer.eos_token_id).int().argmax())
    with torch.no_grad():
        return tower(input_ids=ids).last_hidden_state[0, [end - 1, end + 5]]


@pytest.mark.parametrize("word", ["beautiful", "portrayal", "gorgeous"])
def test_an_unknown_word_of_the_shipped_tower_says_nothing(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, word: str
) -> None:
    said, asked = (states(tower, tokenizer, f"a {one} of a cat") for one in ("picture", word))
    assert (F.cosine_similarity(said, asked, dim=1) > 0.7).all()
    other = states(tower, tokenizer, "a picture of a dog")
    assert F.cosine_similarity(said[0], other[0], dim=0) < 0.5  # the control
    rows = tokenizer(word, add_special_tokens=False).input_ids
    fillers = [
        tokenizer(one, add_special_tokens=False).input_ids[0] for one in (*FILLERS, *FILLER_NOUNS)
    ]
    weight = tower.get_input_embeddings().weight
    # Some of its pieces may stand in captions.
    assert any(torch.equal(weight[row], weight[one]) for row in rows for one in fillers)


def test_phrasings_of_pencils_are_trained_and_the_held_out_one_is_not() -> None:
    scene = {"things": [{"kind": "object", "name": "cat", "style": "noto", "spot": [0.75, 0.5, 0.5]}],
             "background": "white", "artist": "", "use": "named", "horizon": 0.5}  # fmt: skip
    rng = random.Random(1)
    told = {caption(scene, rng, WORLD) for _ in range(3000)}
    assert any("pencil" in text for text in told)
    assert not any(is_held_out(text) for text in told)
