"""The pieces of UCE's refit, as another method would use them; and where a prompt's last token is."""

import pytest
import torch

import expunge
import tiny
from conftest import tiny_pipeline
from expunge import Concept, ExpungeError, Problem
from expunge.erasing.concept_tokens import find_phrases, last_tokens, sample_words, vocabulary_words
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts
from expunge.erasing.refit import Refit, RefitSums, match_from_last_token
from expunge.methods.uce import UCE
from expunge.ops.least_squares import outer, solve_right_factor


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


class TestFewRows:
    """Fewer rows than the text is wide are solved for in their span: the same M, as thin factors."""

    WIDTH = 60

    def fill(self, sums, erased=7, retained=20):
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(2 * erased + retained, self.WIDTH, generator=draw)
        e, a, r = rows.split([erased, erased, retained])
        for weight, some in zip((0.25, 3.0), torch.arange(erased).chunk(2), strict=True):
            sums.erase(e[some], a[some], weight)
        sums.retain(r, 0.7)
        return sums

    @pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
    def test_equals_the_solution_by_sums(self, ridge):
        few, summed = self.fill(RefitSums()), self.fill(RefitSums())
        assert few.rank == 7
        wanted = solve_right_factor(summed.cross, summed.gram, summed.prior, ridge)
        assert summed.rank is None
        up, down = few.factor(ridge)
        eye = torch.eye(self.WIDTH, dtype=torch.float64)
        assert float((eye + up @ down - wanted).norm() / (wanted - eye).norm()) < 1e-5
        torch.testing.assert_close(few.solve(ridge), wanted.float(), rtol=1e-5, atol=1e-6)

    def test_as_many_rows_as_the_width_are_summed(self):
        assert self.fill(RefitSums(), retained=self.WIDTH - 8).rank == 7
        assert self.fill(RefitSums(), retained=self.WIDTH - 7).rank is None

    def test_without_a_ridge_it_has_no_solution(self):
        with pytest.raises(ExpungeError, match="singular.*raise the ridge from 0"):
            self.fill(RefitSums()).solve(0.0)

    def test_a_model_gets_thin_factors_that_do_the_same(self, monkeypatch):
        model = expunge.load(tiny.flux2())
        problem = Problem((Concept("airplane", "sky"),))
        method = UCE(
            1.0, positions="last", retain_positions="last", num_retain_words=3, templates=("{}",)
        )
        (thin,) = expunge.erase(model, problem, method).changes
        assert thin.kind == "low-rank"
        assert len(thin.down) == 1
        monkeypatch.setattr(RefitSums, "rank", None)
        (whole,) = expunge.erase(model, problem, method).changes
        assert whole.kind == "right"
        before = model.weight(thin.layers[0])
        wanted = whole.weight(before) - before
        assert float(wanted.norm()) > 0.01
        found = thin.weight(before) - before
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


class TestManyRows:
    """However rows come, M is that of the sums C, G and P over all of them."""

    WIDTH = 24

    def rows(self, n, seed):
        # Directions of very unequal size, as a language model's states have them.
        sizes = torch.logspace(0, 2, self.WIDTH)
        return torch.randn(n, self.WIDTH, generator=torch.Generator().manual_seed(seed)) * sizes

    @pytest.mark.parametrize("goals", [2, 40], ids=["few goals", "many goals"])
    @pytest.mark.parametrize("kept", [0, 3, 50], ids=["none stay", "few stay", "many stay"])
    @pytest.mark.parametrize("repeats", [1, 3])
    def test_equals_the_plain_solution(self, goals, kept, repeats):
        e, a, r = self.rows(80, 1), self.rows(goals, 2).repeat(80 // goals, 1), self.rows(kept, 3)
        a[:5] = e[:5]  # sent where they are
        sums = RefitSums()
        cross, gram, prior = (torch.zeros(self.WIDTH, self.WIDTH, dtype=torch.float64) for _ in range(3))
        for _ in range(repeats):
            for some in torch.arange(80).split(7):
                sums.erase(e[some], a[some], 0.3)
                cross += 0.3 * outer(a[some], e[some])
                gram += 0.3 * outer(e[some], e[some])
            sums.retain(r, 2.0)
            prior += 2.0 * outer(r, r)
        wanted = solve_right_factor(cross, gram, prior, 0.5)
        found = sums.right_factor(0.5)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-9
        more = 3.0 * outer(e, e)
        wanted = solve_right_factor(cross, gram, prior + more, 0.5)
        found = sums.right_factor(0.5, more)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-9
        # What is sent where it is may stand in either sum.
        torch.testing.assert_close(sums.gram + sums.prior, gram + prior, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sums.cross + sums.prior, cross + prior, rtol=1e-9, atol=1e-9)
        assert sums.energy == pytest.approx(float(gram.trace()))

    def test_equal_rows_are_solved_for_once(self):
        e, a = self.rows(2 * self.WIDTH, 1), self.rows(2 * self.WIDTH, 2)
        sums = RefitSums()
        for _ in range(5):
            sums.erase(e[:6], a[:6])
            sums.erase(e[:6], e[:6])
            sums.retain(e[6:9], 2.0)
        # 75 rows of a text 24 wide: 6 that are sent, and 9 that stay.
        assert sums.rank == 6
        assert sum(len(some.rows) for some in sums.pending) == 15

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_rows_of_any_dtype(self, dtype):
        e, a = self.rows(60, 1).to(dtype), self.rows(60, 2).to(dtype)
        sums = RefitSums()
        sums.erase(e, a)
        sums.erase(e[:3].double(), a[:3].double())
        both = [torch.cat([x, x[:3]]) for x in (e, a)]
        wanted = solve_right_factor(outer(*both[::-1]), outer(both[0], both[0]), torch.zeros(()), 1.0)
        assert float((sums.right_factor(1.0) - wanted).norm() / wanted.norm()) < 1e-9


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
