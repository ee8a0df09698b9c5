"""Pieces on a real Ray, started on this machine: the local result, whatever happens to workers."""

import os
import signal

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.methods.mace import MACE
from expunge.runtime import ray_backend
from expunge.runtime.context import RunContext

ray = pytest.importorskip("ray", reason="spreads work only with expunge[ray]")

NAMES = ["airplane", "Côte d'Ivoire", "cat", "dog", "frog"]


@pytest.fixture(scope="module", autouse=True)
def started():
    """A small Ray; a process that is connected to one uses it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"num_cpus": 2, "object_store_memory": 200_000_000, "include_dashboard": False}
    ray.init("local", log_to_driver=False, logging_level="ERROR", **small)
    yield
    ray.shutdown()


def maker(run, before=lambda name: None):
    """What makes pieces of a large matrix and random numbers, in batches that are one product."""
    weight = torch.randn(300, 300, generator=run.generator("weight"))

    def make(names):
        for name in names:
            before(name)
        x = torch.stack([torch.randn(300, 4, generator=run.generator(name)) for name in names])
        return {name: {"y": y, "gram": y.T @ y} for name, y in zip(names, weight @ x, strict=True)}

    return make


def equal(first, second):
    return list(first) == list(second) and all(
        torch.equal(first[name][key], second[name][key]) for name in first for key in ("y", "gram")
    )


def test_its_address_is_one():
    ray_backend.check_address(ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_local_result_though_a_worker_dies(tmp_path, batch):
    def dies_once(name):
        if name == "cat" and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    here = RunContext(seed=3)
    expected = here.map_cached(maker(here), NAMES, batch_size=batch)
    seen = []
    run = RunContext(3, lambda *told: seen.append(told), tmp_path / "work", "local")
    assert equal(run.map_cached(maker(run, dies_once), NAMES, batch_size=batch, label="x"), expected)
    assert (tmp_path / "died").exists()
    assert (seen[0], seen[-1]) == (("x", 0, 5), ("x", 5, 5))
    # All were kept: nothing is left to be made, here or there.
    assert equal(run.map_cached(None, NAMES, batch_size=batch, label="x"), expected)


def test_an_error_comes_back_as_it_was():
    def refuses(name):
        if name == "dog":
            raise ExpungeError("the mask of 'dog' is empty")

    run = RunContext(ray="local")
    with pytest.raises(ExpungeError, match="^the mask of 'dog' is empty$"):
        run.map_cached(maker(run, refuses), NAMES)


def test_what_is_finished_is_kept_when_a_piece_kills_every_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_backend, "RETRIES", 1)

    def always_dies(name):
        if name == "frog":
            while len(list((tmp_path / "work").rglob("[!.]*.safetensors"))) < 4:
                pass
            os.kill(os.getpid(), signal.SIGKILL)

    run = RunContext(folder=tmp_path / "work", ray="local")
    with pytest.raises(ExpungeError, match="Ray gave up on frog after 2 tries: .*died"):
        run.map_cached(maker(run, always_dies), NAMES)
    assert len(list((tmp_path / "work").rglob("[!.]*.safetensors"))) == 4


def test_mace_ends_with_the_local_edit(model):
    """The model, its images and training go to other processes and come back as one edit."""
    problem = Problem(tuple(Concept(name, "sky") for name in ("airplane", "ship", "bird", "cat", "dog")))
    method = MACE(
        num_images=1,
        num_inference_steps=2,
        max_train_steps=3,
        masks="none",
        captions="",
        learning_rate=0.01,
        batch_size=2,
    )
    here = expunge.erase(model, problem, method)
    there = expunge.erase(model, problem, method, ray="local")
    assert there.hash == here.hash
    assert there.changes[1].up.any()
