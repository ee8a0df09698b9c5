"""Forecast: how far other names will move, before anything is changed."""

import pytest
import torch

import expunge
from conftest import weights
from expunge import Concept, Problem
from expunge.base.errors import ExpungeError
from expunge.changes import find_layer
from expunge.cli import main as command_line
from expunge.erasing.prompt_templates import GENERAL, KEPT, RETAINED, TEMPLATES
from expunge.evaluation.forecast import PROMPT, forecast
from expunge.methods import uce
from expunge.methods.uce import UCE
from test_prompt_templates import wording

PROBLEM = Problem((Concept("airplane", "sky"),), ("dog", "a red ship"))
CHEAP = UCE(num_retain_words=20)


def moved(model, edit, name):
    """How far a name's prompt moves, by running every entry with and without the edit."""
    text, total = model.encode([PROMPT.replace("{}", name)]), 0.0
    for entry in model.text_entries():
        layer = find_layer(model.pipe, entry.layer)
        before = layer(text.embeddings)
        with model.using(edit):
            after = layer(text.embeddings)
        size = model.weight(entry.layer).square().sum()
        total += float((after - before).square().sum(-1).mean() / size)
    return total**0.5


@torch.no_grad()
def test_shares_are_what_the_edit_does_to_every_entry(worded):
    found = forecast(worded, PROBLEM, CHEAP, neighbours=("bird", "jet"), words=5)
    edit = expunge.erase(worded, PROBLEM, CHEAP)
    own = moved(worded, edit, "airplane")
    for move in found.moves:
        assert move.share == pytest.approx(moved(worded, edit, move.name) / own, rel=1e-3)


def test_what_is_near_moves_further_than_what_is_kept(worded):
    found = forecast(worded, PROBLEM, CHEAP, neighbours=("aircraft", "bird"), words=0)
    shares = {move.name: move.share for move in found.moves}
    assert shares["aircraft"] > 3 * shares["dog"]
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert found.exact
    assert found.method == "uce"


def test_every_name_has_one_role_and_what_is_erased_has_none(worded):
    names = ("Airplane", "dog", "bird", "bird")
    found = forecast(worded, PROBLEM, CHEAP, neighbours=names, words=3)
    roles = {move.name: move.role for move in found.moves}
    assert roles.pop("dog") == roles.pop("a red ship") == "retained"
    assert roles.pop("bird") == "neighbour"
    assert list(roles.values()) == ["word"] * len(roles)
    assert len(found.moves) == len({move.name for move in found.moves})


def test_a_method_that_trains_is_forecast_by_a_closed_form(worded):
    found = forecast(worded, PROBLEM, "esd", words=0)
    assert (found.exact, found.method) == (False, "uce")
    assert found.moves == forecast(worded, PROBLEM, "uce", words=0).moves


def test_the_model_stays_as_it_is(worded):
    before = weights(worded.pipe)
    forecast(worded, PROBLEM, CHEAP, words=2)
    after = weights(worded.pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_prompt_is_none_that_a_method_fits():
    fitted = [*RETAINED, *KEPT.values(), GENERAL]
    fitted += [t for kinds in (TEMPLATES, uce.TEMPLATES) for texts in kinds.values() for t in texts]
    assert wording(PROMPT) not in {wording(template) for template in fitted}


def test_an_unknown_method_is_said(worded):
    with pytest.raises(ExpungeError, match="ucee"):
        forecast(worded, PROBLEM, "ucee")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concept", "airplane", "--method", "ucee"], "did you mean 'uce'"),
        (["--concept", "airplane", "--kind", "objct"], "did you mean 'object'"),
        (["--concept", "airplane", "--words", "-1"], "at least 0, not -1"),
        (["--concept", "airplane", "--model", "emojj"], "did you mean 'emoji'"),
        (["--concept", "airplane", "--preset", "origin"], "origin"),
        ([], "erase"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said, capsys):
    assert command_line.main(["forecast", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_the_furthest_first(capsys):
    assert (
        command_line.main(["forecast", "--concept", "airplane", "--retain", "bird", "--words", "0"]) == 0
    )
    told = capsys.readouterr().out
    assert "'airplane' becomes 'ground'" in told
    assert "to be retained" in told
    first = told.partition("known to this model's suites")[2].splitlines()[1]
    assert first.split(maxsplit=1)[1] in ("aircraft", "jet", "plane", "aeroplane")
