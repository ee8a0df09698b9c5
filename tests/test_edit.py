"""Edits as files, and on plain pipelines."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline, weights
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Problem
from expunge.changes import Gated


@pytest.fixture
def edit(model, problem):
    return expunge.erase(model, problem)


@pytest.fixture
def path(edit, tmp_path):
    edit.save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


def test_record(edit):
    record = edit.record
    assert record.method == "uce"
    assert record.fields["ridge"] == 50
    assert record.problem.erase[0].anchor == "sky"
    assert set(record.versions) == {"expunge", "torch", "diffusers", "transformers"}
    assert len(record.base) == len(edit.hash) == 64


@torch.no_grad()
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("airplane", num_inference_steps=2, generator=generator, output_type="pt").images


def test_applies_to_a_plain_pipeline(edit, pipe, tmp_path):
    before = weights(pipe)
    original = draw(pipe)
    applied = edit.apply(pipe)
    erased = draw(pipe)
    assert not torch.allclose(original, erased, atol=1e-3)
    pipe.save_pretrained(tmp_path / "erased")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "erased", safety_checker=None)
    torch.testing.assert_close(draw(again), erased)
    applied.remove()
    assert torch.equal(draw(pipe), original)
    assert all(torch.equal(before[k], v) for k, v in weights(pipe).items())


def test_edits_stack_without_a_false_warning(edit, model):
    other = expunge.erase(model, Problem((Concept("horse"),)))
    before = weights(model.pipe)
    with edit.apply(model), other.apply(model):
        pass
    assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())


def test_other_weights_are_a_warning(edit):
    other = tiny_pipeline(seed=1)
    assert not edit.fits(other)
    with pytest.warns(ExpungeWarning, match="made from other weights"):
        edit.apply(other).remove()


def test_a_half_precision_copy_counts_as_the_model(edit):
    pipe = tiny_pipeline()
    pipe.unet.half()
    assert edit.fits(pipe)
    pipe.unet.float()
    assert edit.fits(pipe)


def test_other_shapes_are_an_error(edit):
    with pytest.raises(ExpungeError, match="the edit does not fit"):
        edit.apply(tiny_pipeline(width=48))


def test_every_kind_of_change_survives_saving(edit, tmp_path):
    layer = edit.changes[0].layers[0]
    factors = {"up": torch.rand(2, 3), "down": torch.rand(3, 2), "goal": torch.rand(3)}
    owner = torch.tensor([0, 0, 1])
    gated = Gated((layer,), torch.rand(2, 2), torch.rand(2), torch.rand(2), **factors, owner=owner)
    Edit((*edit.changes, gated), edit.record).save(tmp_path / "both.safetensors")
    again = Edit.load(tmp_path / "both.safetensors")
    assert [c.kind for c in again.changes] == ["right", "gated"]
    assert again.changes[1].spec == gated.spec
    assert torch.equal(again.changes[1].direction, gated.direction)


def test_an_interrupted_save_leaves_the_earlier_file(path, edit, monkeypatch):
    earlier = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        edit.save(path)
    assert path.read_bytes() == earlier
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_broken_and_foreign_files(path, tmp_path):
    with pytest.raises(ExpungeError, match="cannot read"):
        Edit.load(tmp_path / "absent.safetensors")
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-7])
    with pytest.raises(ExpungeError, match="not a whole safetensors file"):
        Edit.load(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ExpungeError, match="but not an edit"):
        Edit.load(foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "newer expunge"),
        (lambda d: d["changes"][0].update(kind="magic"), "newer expunge"),
        (lambda d: d.pop("record"), "not a whole edit"),
        (lambda d: d["record"].update(unheard="of"), "not a whole edit"),
        (lambda d: d["changes"].append(d["changes"][0]), "not a whole edit"),
    ],
)
def test_a_record_that_is_not_ours(path, change, message):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["expunge"])
    change(data)
    save_file(load_file(path), path, {"expunge": json.dumps(data)})
    with pytest.raises(ExpungeError, match=message):
        Edit.load(path)


def test_an_edit_at_a_strength(edit, pipe):
    name = edit.changes[0].layers[0].removeprefix("unet.")
    before = pipe.unet.get_submodule(name).weight.detach().clone()
    with edit.apply(pipe):
        full = pipe.unet.get_submodule(name).weight.detach().clone()
    with edit.apply(pipe, strength=0.8):
        found = pipe.unet.get_submodule(name).weight.detach()
        torch.testing.assert_close(found, before + 0.8 * (full - before))
        assert edit.fits(pipe)
    with pytest.raises(ExpungeError, match=r"^strength must be 0 \(nothing changes\) or more, not -1$"):
        edit.apply(pipe, strength=-1)
    assert torch.equal(pipe.unet.get_submodule(name).weight, before)


def test_what_a_notebook_shows_of_an_edit(edit):
    many = tuple(Concept(f"<b>{i}</b>", "sky", synonyms=("a & b",) if not i else ()) for i in range(13))
    record = dataclasses.replace(edit.record, problem=Problem(many, ("ship", "bird")), model="<script>")
    html = Edit(edit.changes, record)._repr_html_()
    assert "erases &lt;b&gt;0&lt;/b&gt;, a &amp; b</th><td>object; becomes &#x27;sky&#x27;" in html
    assert "and 3 more" in html
    assert "<td>ship, bird</td>" in html
    assert "<td>uce, seed 0, " in html
    assert "<td>&lt;script&gt; (StableDiffusion)</td>" in html
    assert "right on" in html
    assert not re.search("<b>|<script|https?:|src=", html)
