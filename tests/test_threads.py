"""How many threads there are: as many as cores are free, one for small networks."""

import pytest
import torch

import expunge
from expunge.checkpoints.cost_estimate import count_operations
from expunge.runtime import threads
from expunge.runtime.threads import Threads, Ticks, choose_threads, count_busy_cores


class TestThreads:
    @pytest.fixture(autouse=True)
    def two(self, monkeypatch):
        """PyTorch with two threads, as it thinks; what it is told is kept."""
        state = {"threads": 2}
        monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
        monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
        for name in threads.CHOSEN_BY_USER:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(threads, "count_cores", lambda: 2.0)
        monkeypatch.setattr(threads.time, "sleep", lambda _: None)
        return state

    def loads(self, monkeypatch, used):
        """Ticks one second apart, between which others use so many cores."""
        moments, busy = iter(range(100)), [0.0]

        def ticks():
            at = next(moments)
            busy[0] += used[min(at, len(used) - 1)]
            return Ticks(10.0 * at, 10 * busy[0], 0.0)

        monkeypatch.setattr(threads, "read_ticks", ticks)
        monkeypatch.setattr(threads.time, "monotonic", lambda: 1e6)

    def test_as_many_as_cores_are_free(self, monkeypatch, two):
        for used, expected in ((0.0, 2), (0.2, 2), (1.0, 1), (1.9, 1)):
            two["threads"] = 2
            self.loads(monkeypatch, [used])
            with Threads():
                assert two["threads"] == expected
            assert two["threads"] == 2

    def test_a_job_that_comes_and_goes(self, monkeypatch, two):
        self.loads(monkeypatch, [0.0, 0.0, 1.0, 0.0])
        with Threads() as found:
            seen = []
            for _ in range(3):
                seen.append(two["threads"])
                found.adjust()
        assert seen == [2, 1, 2]

    def test_small_networks_have_one(self, two):
        with Threads(small=True) as found:
            assert two["threads"] == 1
            found.adjust()
            assert two["threads"] == 1
        assert two["threads"] == 2

    @pytest.mark.parametrize("name", threads.CHOSEN_BY_USER)
    def test_who_has_chosen_is_left_alone(self, monkeypatch, two, name):
        monkeypatch.setenv(name, "2")
        with Threads(small=True):
            assert two["threads"] == 2

    def test_a_system_that_does_not_say(self, monkeypatch, two):
        monkeypatch.setattr(threads, "read_ticks", lambda: None)
        with Threads() as found:
            found.adjust()
            assert two["threads"] == 2

    def test_shares(self):
        assert count_busy_cores(Ticks(0, 10, 4), Ticks(2, 14, 5)) == pytest.approx(1.5)
        assert [choose_threads(4, free) for free in (4.0, 3.9, 2.5, 0.0, -1.0)] == [4, 4, 2, 1, 1]


def test_the_shipped_model_is_small_and_a_large_one_is_not(model):
    assert count_operations(model) < threads.SMALL
    assert count_operations(expunge.load("emoji")) < threads.SMALL
