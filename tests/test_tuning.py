"""Autotune: the weakest edit that erases enough, with its stop rule and what it records."""

import pytest

import expunge
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Problem
from expunge.erasing.moved_share import measure_drift
from expunge.methods.uce import UCE
from expunge.tuning import FACTOR

PROBLEM = Problem((Concept("cat", "sky"),), ("ship",))
FEW = UCE(ridge=50.0, num_retain_words=10)


def tries(edit):
    return edit.record.tuned["tries"]


class TestAutotune:
    def test_takes_the_weakest_that_erases_enough(self, worded, tmp_path):
        edit = expunge.autotune(worded, PROBLEM, FEW, enough=0.6, most_drift=10)
        values = [one["value"] for one in tries(edit)]
        assert values[0] == 50 * FACTOR**2
        assert values == sorted(values, reverse=True)
        assert all(one["moved"] < 0.6 for one in tries(edit)[:-1])
        assert tries(edit)[-1]["moved"] >= 0.6
        assert edit.record.fields["ridge"] == edit.record.tuned["chosen"] == values[-1]
        edit.save(tmp_path / "edit.safetensors")
        assert Edit.load(tmp_path / "edit.safetensors").record.tuned == edit.record.tuned

    def test_stops_where_what_stays_moves(self, worded):
        with pytest.warns(ExpungeWarning, match="no ridge of uce"):
            loose = expunge.autotune(worded, PROBLEM, FEW, enough=0.999, most_drift=10, max_tries=3)
        limit = tries(loose)[1]["drift"]  # the third moves more, and so is not taken
        assert limit < tries(loose)[2]["drift"]
        with pytest.warns(ExpungeWarning, match="moved every concept by 99.9 %"):
            edit = expunge.autotune(worded, PROBLEM, FEW, enough=0.999, most_drift=limit, max_tries=9)
        assert edit.record.tuned["chosen"] == tries(loose)[1]["value"]

    def test_costs_no_more_than_its_tries(self, worded):
        with pytest.warns(ExpungeWarning, match="no ridge of uce"):
            edit = expunge.autotune(worded, PROBLEM, FEW, enough=0.99, max_tries=1)
        assert len(tries(edit)) == 1

    def test_an_edit_without_it_records_nothing(self, worded):
        edit = expunge.erase(worded, PROBLEM, FEW)
        assert edit.record.tuned == {}
        assert "tuned" not in edit.record.to_dict()

    def test_drift_is_that_of_the_weights(self, worded):
        edit = expunge.erase(worded, PROBLEM, FEW)
        x = worded.encode(["ship"]).embeddings.double()
        moved = whole = 0.0
        for entry in worded.text_entries():
            w = worded.weight(entry.layer)
            after = next(c for c in edit.changes if entry.layer in c.layers).weight(w)
            moved += float((x @ (after - w).double().T).square().sum())
            whole += float((x @ w.double().T).square().sum())
        found = measure_drift(worded, edit.changes, ["ship"])
        assert found == pytest.approx((moved / whole) ** 0.5, rel=1e-3)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"method": "esd"}, "esd has none: take one of double_projections, rece"),
            ({"method": FEW, "enough": 1.2}, "enough must be above 0 and at most 1, not 1.2"),
            ({"method": FEW, "max_tries": 0}, "max_tries must be above 0"),
        ],
    )
    def test_refuses(self, worded, given, says):
        with pytest.raises(ExpungeError, match=says):
            expunge.autotune(worded, PROBLEM, **given)
