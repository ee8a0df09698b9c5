"""The pieces of UCE's refit, as another method would use them; and where a prompt's last token is."""

import pytest
import torch

import expunge
import tiny
from conftest import tiny_pipeline
from expunge import Concept, Problem
from expunge.erasing.concept_tokens import find_phrases, last_tokens, sample_words, vocabulary_words
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts
from expunge.erasing.refit import Refit, RefitSums, match_from_last_token
from expunge.methods.uce import UCE


def test_a_method_of_its_own_gets_uces_edit_from_the_pieces(model):
    concept, templates = Concept("airplane", "the sky", synonyms=("jet",)), ("{}", "a photo of {}")
    refit = Refit()
    erased = assemble_prompts(concept, templates)
    anchored = assemble_anchor_prompts(concept, templates) * len(concept.names)
    refit.erase(model.encode(erased), model.encode(anchored), 1 / len(erased))
    refit.retain(model.encode(["ship"]), 2.0)
    (change,) = refit.solve(model, 3.0)
    method = UCE(
        3.0,
        retain_scale=2.0,
        num_retain_words=0,
        templates=templates,
        retain_templates=("{}",),
        also_retain=(),
    )
    (own,) = expunge.erase(model, Problem((concept,), ("ship",)), method).changes
    assert torch.equal(change.matrix, own.matrix)
    assert change.layers == own.layers


def test_rows_found_by_other_means_can_be_sent_to_goals():
    rows, goals = torch.randn(3, 5), torch.randn(3, 5)
    sums = RefitSums()
    sums.erase(rows, goals)
    matrix = sums.solve(1e-9)
    torch.testing.assert_close(rows @ matrix.T, goals, rtol=1e-3, atol=1e-3)


def test_pairs_begin_at_the_last_content_token_and_end_with_the_shorter_padding(model):
    erased, anchored = model.encode(["airplane"]), model.encode(["the blue sky"])
    e, a = match_from_last_token(erased, anchored)
    last = int(anchored.content_mask.sum())
    assert len(e) == len(a) == 77 - last
    assert torch.equal(e[0], erased.embeddings[0, 1])
    assert torch.equal(a[0], anchored.embeddings[0, last])
    assert [len(x) for x in match_from_last_token(erased, anchored, "last")] == [1, 1]


@pytest.mark.parametrize(
    ("pipeline", "starts", "empty"),
    [(tiny_pipeline, [1], [0]), (tiny.flux, [0], [0]), (tiny.sd3, [1, 77], [0, 77])],
    ids=["CLIP", "T5", "CLIP and T5"],
)
def test_the_last_token_of_every_encoder(pipeline, starts, empty):
    """CLIP's prompts begin with a start token, T5's with the first word; of one word it is the last."""
    model = expunge.load(pipeline())
    text = model.encode(["ship", ""])
    assert [span.start for span in text.from_last_token(0)] == starts
    # The empty prompt has its start token there, or its end token where there is no start.
    assert [span.start for span in text.from_last_token(1)] == empty
    assert last_tokens(text).shape[0] == 2 * len(starts)
    assert [span.stop for span in text.from_last_token(0)][-1] == text.embeddings.shape[1]


def test_phrases_are_found_name_after_name(model):
    concept, templates = Concept("airplane", synonyms=("jet plane",)), ("a {} of art", "{}")
    text = model.encode(assemble_prompts(concept, templates))
    found = find_phrases(model, templates, text, len(concept.names))
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[2], [1], [2, 3], [1, 2]]


def test_words_of_an_erased_name_are_not_among_the_words(model):
    erased = (Concept("jet-plane"), Concept("street art", kind="style"))
    words = vocabulary_words(model, erased)
    assert {"jet", "plane", "street", "art"} < set(model.vocabulary())
    assert not {"jet", "plane", "street", "art"} & set(words)
    some = sample_words(model, erased, 5, torch.Generator().manual_seed(0))
    assert len(set(some) & set(words)) == 5
