"""Edits and files that the tests of exports share."""

import torch
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from expunge import Concept, Edit, Probe, Problem
from expunge.base import registry
from expunge.changes import Gated, LowRank
from expunge.fingerprint import hash_base, list_places, make_base_reader
from tiny import single_file

PROBE = Probe.of("airplane", 2, num_inference_steps=2)


def edited(model, changes):
    """An edit of these changes, made from this model."""
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    record = expunge.erase(model, problem, registry.get("methods", "uce")(num_retain_words=2)).record
    object.__setattr__(record, "base", hash_base(make_base_reader(model.pipe), list_places(changes)))
    return Edit(tuple(changes), record)


def low_rank(model, rank=2):
    """A change of low rank for each layer through which text enters."""
    torch.manual_seed(7)
    return [
        LowRank((e.layer,), torch.randn(w.shape[0], rank) / 3, torch.randn(rank, w.shape[1]) / 3)
        for e in (*model.text_entries(), *model.pooled_entries())
        for w in [model.weight(e.layer)]
    ]


def drawn(model, *edits):
    with model.using(*edits):
        return model.draw(PROBE)


def single_in(path, dtype):
    """The tiny model as a single file, in a number format."""
    single_file(tiny_pipeline(), path)
    save_file({key: t.to(dtype) for key, t in load_file(path).items()}, path, {"format": "pt"})
    return path


def gated(model):
    """A change that stands before every layer through which text enters, always half open."""
    width = model.weight(model.text_entries()[0].layer).shape[1]
    torch.manual_seed(3)
    down = torch.nn.functional.normalize(torch.randn(1, width), dim=1)
    return Gated(
        tuple(entry.layer for entry in model.text_entries()),
        direction=torch.zeros(1, width),
        centre=torch.zeros(1),
        slope=torch.ones(1),
        up=down.T.contiguous(),
        down=down,
        goal=torch.zeros(1),
        owner=torch.zeros(1, dtype=torch.int64),
    )
