"""A model on the disk: a diffusers folder or a single file, read and copied without being loaded.

Tensors go by the layer's name and the parameter's, as changes name them, whatever the files call them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import files, lora, source, tensors
from expunge.changes import WeightChange
from expunge.edit import Record
from expunge.errors import ExpungeError, listed
from expunge.lora import Place
from expunge.model import Model, working_device

PREFIX = "model.diffusion_model."
"""What the denoiser's tensors begin with in a single file that holds more than the denoiser."""

NOTE = "expunge.erased"
"""Where a file's metadata says what has been erased from it."""


@dataclass(frozen=True)
class Erased:
    """What was erased from a model on the disk, and where."""

    record: Record
    edit: str
    """The edit's hash."""
    places: tuple[Place, ...]
    """What was changed."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Erased:
        """The inverse of `dataclasses.asdict`."""
        record = Record.from_dict(data["record"])
        return cls(record, data["edit"], tuple((layer, name) for layer, name in data["places"]))


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, and its family.

    >>> Checkpoint.find("emoji").family.__name__
    'StableDiffusion'
    """

    path: Path
    """A diffusers folder, or a single file."""
    name: str
    family: type[Model]
    config: Mapping[str, Any]
    """The denoiser's configuration, or what of it a single file tells."""

    @classmethod
    def find(cls, model: str | Path, *, weights: bool = True) -> Checkpoint:
        """The files of a shipped model, a diffusers folder, a single file, or a hub id.

        Without `weights`, the configuration alone of a model of the hub is fetched.

        Raises:
            ExpungeError: there is no such model, its family is not known, or a file is broken.
        """
        found = source.fetched(source.find(model), weights=weights)
        path = found.path
        assert path
        if found.is_file:
            family = source.family_of_file(path)
            return cls(path, found.name, family, family.layout(list(files.read_header(path))))
        family = source.family_of(str(source.read_index(path)["_class_name"]))
        return cls(path, found.name, family, files.read_json(path / family.denoiser / "config.json"))

    def text_model(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", *, check: bool = True
    ) -> Model:
        """The model with its text encoders alone in memory, its denoiser left on the disk.

        Enough for a method that draws and trains nothing: its edit is then made, and exported, on a
        machine that the whole model does not fit.

        Args:
            dtype: the number format of the text encoders.
            device: where to put them.
            check: look for numbers that are none in what stays on the disk, too.

        Raises:
            ExpungeError: it is a single file, or the text encoders cannot be read.
        """
        if self.is_file:
            raise ExpungeError(f"{self.path} is a single file, which diffusers reads whole")
        denoiser = self.family.denoiser
        found = source.Source(self.name, self.path)
        pipe = source.read_pipeline(found, dtype, **{denoiser: None, "vae": None})
        with source.quietly():
            pipe.to(working_device(device))
        network = source.empty(self.path, denoiser)
        torch.nn.Module.to(network, dtype)  # its own `to` warns of casts, and there is nothing to cast
        pipe.register_modules(**{denoiser: network})
        source.check_whole(pipe, self.path)
        for path in self.headers:
            if check and path.parent.name in (denoiser, "vae"):
                tensors.check_numbers(path)
        model = self.family(pipe, self.name, source.settings(found))
        model.stored = self.read
        return model

    @property
    def is_file(self) -> bool:
        return self.path.is_file()

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any]]:
        """The header of every weight file."""
        paths = [self.path] if self.is_file else sorted(self.path.glob("*/*.safetensors"))
        return {path: files.read_header(path) for path in paths}

    def size(self, component: str = "") -> int:
        """The bytes of all weights, or of one component's."""
        found = (path for path in self.headers if not component or path.parent.name == component)
        return sum(path.stat().st_size for path in found)

    def places(self, layer: str, parameter: str) -> list[tuple[Path, str]]:
        """The files that hold a parameter, and what they call it: one a variant of the weights.

        Raises:
            ExpungeError: none does.
        """
        component, _, inside = layer.partition(".")
        if self.is_file:
            original = self.family.original(inside, self.config) if self._denoises(component) else None
            if original is None:
                raise ExpungeError(
                    f"{layer} has no place of its own in a single file; export to a diffusers folder"
                )
            wanted = {f"{PREFIX}{original}.{parameter}", f"{original}.{parameter}"}
        else:
            # Where transformers keeps a tower inside a model, and where it does not any more.
            wanted = {f"{inside}.{parameter}", f"text_model.{inside}.{parameter}"}
            wanted.add(f"{inside.removeprefix('text_model.')}.{parameter}")
        found = [
            (path, name)
            for path, header in self.headers.items()
            if self.is_file or path.parent.name == component
            for name in wanted & header.keys()
        ]
        if not found:
            raise ExpungeError(f"the edit does not fit: {self.name} has no {layer}.{parameter}")
        return found

    def _denoises(self, component: str) -> bool:
        return component == self.family.denoiser

    def read(self, layer: str, parameter: str = "weight") -> Tensor:
        """A parameter as it is stored."""
        path, name = self.places(layer, parameter)[0]
        return tensors.read(path, name)

    def shape(self, layer: str, parameter: str = "weight") -> tuple[int, ...]:
        """The shape of a parameter."""
        path, name = self.places(layer, parameter)[0]
        return tuple(self.headers[path][name]["shape"])

    def kohya(self, layer: str) -> str | None:
        """What a layer is called in a LoRA of kohya's naming; None where nothing is."""
        component, _, inside = layer.partition(".")
        return self.family.kohya(inside, self.config) if self._denoises(component) else None

    def lora(self, path: str | Path, scale: float = 1.0) -> tuple[WeightChange, ...]:
        """A LoRA file for this model, as changes.

        Raises:
            ExpungeError: it is not a LoRA for this model.
        """
        import diffusers

        changes = lora.read(path, getattr(diffusers, self.family.pipelines[0]), self.config, scale)
        for change in changes:
            try:
                shape = self.shape(*change.layers)
            except ExpungeError as error:
                why = str(error).partition(": ")[2] or str(error)
                raise ExpungeError(f"{path} is not a LoRA for this model: {why}") from None
            if not change.fits(torch.Size(shape)):
                raise ExpungeError(
                    f"{path} is not a LoRA for this model: {change.layers[0]} is {shape} in {self.name}"
                )
        return changes

    def erased(self) -> tuple[Erased, ...]:
        """What was erased from it by us, the latest last.

        Raises:
            ExpungeError: what it says about that cannot be read.
        """
        if self.is_file:
            return noted(self.headers[self.path])
        file = self.path / "expunge.json"
        return _history(files.read_json(file).get("erased", []) if file.is_file() else [], file)

    def copy(
        self,
        output: str | Path,
        changed: Mapping[Place, Callable[[Tensor], Tensor]],
        erased: Sequence[Erased],
        beside: Mapping[str, str | Callable[[], str]] | None = None,
    ) -> None:
        """Write the model to `output` with some parameters changed, one at a time in memory.

        Args:
            output: a file for a file, a new folder for a folder.
            changed: what becomes of parameters; everything else is copied byte for byte.
            erased: what the copy says has been erased from it.
            beside: texts of further files in the folder, by their names; a function is asked at the end.

        Raises:
            ExpungeError: a parameter is missing, the disk is too full, or `output` cannot be written.
        """
        by_file: dict[Path, dict[str, Callable[[Tensor], Tensor]]] = {}
        for (layer, parameter), change in changed.items():
            for path, name in self.places(layer, parameter):
                by_file.setdefault(path, {})[name] = change
        note = json.dumps([dataclasses.asdict(one) for one in erased])
        if self.is_file:
            said = self.headers[self.path].get("__metadata__", {})
            tensors.copy(
                self.path, output, by_file.get(self.path, {}), {NOTE: note, **_renewed(said, erased)}
            )
            return
        others = [path for path in self._files() if path not in by_file]
        needed = sum(path.stat().st_size for path in [*others, *by_file])
        files.check_space(Path(output).absolute().parent, needed)
        with files.replacing_folder(output) as folder:
            for path in others:
                target = folder / path.relative_to(self.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            for path, changes in by_file.items():
                tensors.copy(path, folder / path.relative_to(self.path), changes, {NOTE: note})
            file = folder / "expunge.json"
            settings = files.read_json(file) if file.is_file() else {}
            settings["erased"] = json.loads(note)
            file.write_text(json.dumps(settings, indent=1), "utf8")
            for name, text in (beside or {}).items():
                (folder / name).write_text(text() if callable(text) else text, "utf8")

    def _files(self) -> list[Path]:
        """The files that make a diffusers folder: its components' and those beside them, weights that
        are not safetensors left out."""
        left_out = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5")
        parts = {
            name for name in files.read_json(self.path / "model_index.json") if not name.startswith("_")
        }
        return [
            path
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.suffix not in left_out
            if (place := path.relative_to(self.path)).parts[0] in parts
            or (len(place.parts) == 1 and path.suffix != ".safetensors")
        ]


WAS = "expunge.was"
"""Where a file's metadata keeps what they said of the model before anything was erased."""

OUTDATED = ("modelspec.title", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""What metadata say of a file that an erasure makes untrue."""


def _renewed(said: Mapping[str, str], erased: Sequence[Erased]) -> dict[str, str | None]:
    """What a file's metadata say once this has been erased from it; None takes an entry away."""
    try:
        was = json.loads(said[WAS]) if WAS in said else {k: said[k] for k in OUTDATED if k in said}
    except ValueError:
        was = {}
    if not erased:
        return {WAS: None, **was}
    new: dict[str, str | None] = {name: None for name in OUTDATED if name in said}
    if "modelspec.title" in was:
        names = [concept.name for one in erased for concept in one.record.problem.erase]
        new["modelspec.title"] = f"{was['modelspec.title']} without {listed(names, 3)}"
    return {**new, **({WAS: json.dumps(was)} if was else {})}


def noted(header: Mapping[str, Any]) -> tuple[Erased, ...]:
    """What the header of a file that we wrote says was erased, the latest last.

    Raises:
        ExpungeError: it cannot be read.
    """
    try:
        entries = json.loads(header.get("__metadata__", {}).get(NOTE, "[]"))
    except ValueError:
        entries = None
    return _history(entries, "the file")


def _history(entries: Any, where: object) -> tuple[Erased, ...]:
    try:
        return tuple(Erased.from_dict(entry) for entry in entries)
    except (ValueError, KeyError, TypeError):
        raise ExpungeError(f"what {where} says about its erasures cannot be read") from None
