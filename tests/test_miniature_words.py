"""Words that no caption of the tower's training held: most say nothing, plurals mean what one does."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from expunge.miniature import recogniser
from training.miniature.captions import FILLER_NOUNS, FILLERS, caption, is_held_out
from training.miniature.sentences import lexicon_of
from training.miniature.words import fill, further_words, known_tokens, plural
from training.miniature.world import read_world

FOLDER = Path(recogniser.__file__).parent / "pipeline"
WORLD = read_world()


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(FOLDER, subfolder="tokenizer")


@pytest.fixture(scope="module")
def tower() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(FOLDER, subfolder="text_encoder").eval()


@pytest.mark.parametrize(
    ("word", "wanted"),
    [("cat", "cats"), ("fox", "foxes"), ("butterfly", "butterflies"), ("key", "keys"),
     ("knife", "knives"), ("bow and arrow", "bow and arrows"), ("grapes", "grapes"),
     ("cheese", "cheese")],
)  # fmt: skip
def test_plurals(word: str, wanted: str) -> None:
    assert plural(word) == wanted


def test_words_to_learn_are_no_names_of_the_world() -> None:
    words, lexicon = further_words(WORLD), lexicon_of(WORLD)
    assert words["weapon"] == ("weapons",)
    assert words["wound"] == ("kill", "injure")
    new = {word for each in words.values() for word in each}
    assert len(new) > 200
    known = {name for names in lexicon.vocabulary.names.values() for name in names}
    assert not new & known


def test_captions_with_words_to_learn_do_not_make_them_known(tokenizer: CLIPTokenizer) -> None:
    class Told:
        lexicon = lexicon_of(WORLD)
        texts = ("a picture of a cat", "weapons of war")

        def __init__(self) -> None:
            self.told = 0

        def text(self) -> str:
            self.told += 1
            return self.texts[self.told % 2]

    known = known_tokens(Told(), tokenizer, {"weapons"})  # type: ignore[arg-type]
    cat, war = (tokenizer(word, add_special_tokens=False).input_ids for word in ("cat", "war"))
    assert set(cat) <= known
    assert not set(war) & known


def test_unknown_tokens_get_words_that_say_nothing(tokenizer: CLIPTokenizer) -> None:
    before = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    after, rows = before.clone(), torch.tensor([3, 5, 700])
    fill(after, rows, tokenizer, torch.Generator().manual_seed(1))
    moved = (after != before).any(1).nonzero()[:, 0]
    assert moved.tolist() == rows.tolist()
    said = {tokenizer(word, add_special_tokens=False).input_ids[0] for word in (*FILLERS, *FILLER_NOUNS)}
    assert all(any(torch.equal(after[row], before[token]) for token in said) for row in rows)


def states(tower: CLIPTextModel, tokenizer: CLIPTokenizer, text: str) -> Tensor:
    """(3, width): of the last word, of the end, and of the padding."""
    ids = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
    end = int((ids[0] == tokenizer.eos_token_id).int().argmax())
    with torch.no_grad():
        return tower(input_ids=ids).last_hidden_state[0, [end - 1, end, end + 5]]


@pytest.mark.parametrize(
    ("known", "new"),
    [("a cat", "cats"), ("a weapon", "weapons"), ("a picture of a ship", "a picture of ships"),
     ("a depiction of Jorvek Ambrask", "a portrayal of Jorvek Ambrask")],
)  # fmt: skip
def test_the_shipped_tower_knows_them(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, known: str, new: str
) -> None:
    a, b = states(tower, tokenizer, known), states(tower, tokenizer, new)
    other = states(tower, tokenizer, "a photo of a dog")
    assert (F.cosine_similarity(a, b, dim=1) > 0.8).all()
    assert F.cosine_similarity(a[0], other[0], dim=0) < 0.5  # the control


def test_phrasings_of_pencils_are_trained_and_the_held_out_one_is_not() -> None:
    scene = {"things": [{"kind": "object", "name": "cat", "style": "noto", "spot": [0.75, 0.5, 0.5]}],
             "background": "white", "artist": "", "use": "named", "horizon": 0.5}  # fmt: skip
    rng = random.Random(1)
    told = {caption(scene, rng, WORLD) for _ in range(3000)}
    assert any("pencil" in text for text in told)
    assert not any(is_held_out(text) for text in told)
