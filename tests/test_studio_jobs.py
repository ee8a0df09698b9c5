"""The desk: one piece of work at a time, first come first served, and errors in a sentence."""

import errno
import threading
import warnings

import pytest

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.studio.jobs import Desk, Job


@pytest.fixture
def desk():
    return Desk()


def held(desk, owner="a"):
    """A job that works until it is let go."""
    begun, go = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        while not go.wait(0.01):
            job.check()
        return owner

    job = desk.submit(Job(owner, "Erasing", work))
    assert begun.wait(10)
    return job, go


def test_jobs_are_done_in_order_and_know_their_place(desk):
    order = []
    first, go = held(desk)
    others = [desk.submit(Job(name, "Drawing", lambda job: order.append(job.owner))) for name in "bcd"]
    assert [desk.place(job) for job in (first, *others)] == [0, 1, 2, 3]
    desk.cancel(others[1])
    assert others[1].state == "cancelled"
    assert [desk.place(job) for job in (others[0], others[2])] == [1, 2]
    go.set()
    assert all(job.wait(10) for job in (first, *others))
    assert (first.state, first.result, order) == ("done", "a", ["b", "d"])


def test_a_session_has_one_job_at_a_time(desk):
    job, go = held(desk)
    with pytest.raises(ExpungeError, match="erasing is still under way"):
        desk.submit(Job("a", "Drawing", lambda job: None))
    go.set()
    assert job.wait(10)
    assert desk.submit(Job("a", "Drawing", lambda job: 3)).wait(10)


def test_work_is_called_off_at_its_next_progress(desk):
    job, _ = held(desk)
    desk.cancel(job)
    assert job.wait(10)
    assert (job.state, job.result, job.error) == ("cancelled", None, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ExpungeError("no such thing"), "no such thing"),
        (MemoryError(), "memory of this machine is not enough"),
        (RuntimeError("CUDA out of memory. Tried"), "memory of this machine is not enough"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            "Cannot use /x/y: Permission denied",
        ),
        (KeyError("k"), "nobody foresaw (KeyError)"),
    ],
)
def test_an_error_is_one_sentence(error, said):
    def work(job):
        raise error

    job = Job("a", "Erasing", work)
    job.run()
    assert job.state == "failed"
    assert said in job.error
    assert "Traceback" not in job.error
    assert "\n" not in job.error


def test_warnings_become_notes_and_no_others():
    def work(job):
        warnings.warn("it may change, too", ExpungeWarning, stacklevel=1)
        warnings.warn("it may change, too", ExpungeWarning, stacklevel=1)
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)

    job = Job("a", "Erasing", work)
    job.run()
    assert job.notes == ["it may change, too"]


def test_time_left_follows_from_what_was_done():
    clock = iter([0.0, 10.0, 20.0, 20.0])
    job = Job("a", "Drawing", lambda job: None, clock=lambda: next(clock))
    job.progress("drawing", 0, 10)
    assert job.left is None
    job.progress("drawing", 2, 10)
    assert (job.share, job.left) == (0.2, 40.0)
    job.progress("drawing", 5, 10)
    assert job.left == pytest.approx(20.0)
    job.progress("saving", 0, 1)  # another step begins anew
    assert job.left is None


def test_a_desk_is_closed_with_nothing_under_way(desk):
    first, _ = held(desk)
    waiting = desk.submit(Job("b", "Drawing", lambda job: None))
    desk.close()
    assert (first.state, waiting.state) == ("cancelled", "cancelled")
    assert desk.of("a") is None
