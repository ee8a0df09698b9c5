"""A model on the disk: a diffusers folder or a single file, read and copied without being loaded.

Tensors go by the layer's name and the parameter's, as changes name them, whatever the files call them.
"""

from __future__ import annotations

import contextlib
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

from expunge.base import files
from expunge.base.errors import ExpungeError, join_names
from expunge.base.quiet import silence_libraries
from expunge.changes import WeightChange
from expunge.checkpoints import loading, lora, safetensors_io
from expunge.checkpoints.load import working_device
from expunge.checkpoints.lora import Place
from expunge.checkpoints.safetensors_io import Change
from expunge.checkpoints.variants import PICKLES, components, read_variants, weight_files
from expunge.edit import Record
from expunge.model import Model

PREFIX = "model.diffusion_model."
"""What the denoiser's tensors begin with in a single file that holds more than the denoiser."""

EMA = "model_ema."
"""What the running mean of the denoiser's tensors begins with, where a single file has it too."""

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
    variant: str | None = None
    """The variant of a folder's weights that is read where it is there; else the plain ones."""

    @classmethod
    def find(cls, model: str | Path, *, weights: bool = True, variant: str | None = None) -> Checkpoint:
        """The files of a shipped model, a diffusers folder, a single file, or a hub id.

        Args:
            model: its name.
            weights: whether to fetch a model of the hub whole; otherwise, its configuration alone.
            variant: which of a folder's weights to read, as in `load`.

        Raises:
            ExpungeError: there is no such model, its family is not known, or a file is broken.
        """
        found = loading.fetched(loading.find(model, variant), weights=weights)
        path = found.path
        if path is None:
            raise TypeError(f"a model on this machine is expected, and {found.name} is one of the hub")
        if found.is_file:
            family = loading.family_of_file(path)
            return cls(path, found.name, family, family.infer_config(list(files.read_header(path))))
        family = loading.family_of(str(loading.read_index(path)["_class_name"]))
        config = files.read_json(path / family.denoiser / "config.json")
        return cls(path, found.name, family, config, variant)

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
        found = loading.Source(self.name, self.path, self.variant)
        pipe = loading.read_pipeline(found, dtype, **{denoiser: None, "vae": None})
        with silence_libraries():
            pipe.to(working_device(device))
        network = loading.empty(self.path, denoiser)
        torch.nn.Module.to(network, dtype)  # its own `to` warns of casts, and there is nothing to cast
        pipe.register_modules(**{denoiser: network})
        loading.check_whole(pipe, self.path, self.variant)
        for part in (denoiser, "vae") if check else ():
            for path in next(iter(self._weights.get(part, {"": ()}).values())):
                safetensors_io.check_numbers(path)
        model = self.family(pipe, self.name, loading.settings(found))
        model.stored = self.read
        return model

    @property
    def is_file(self) -> bool:
        return self.path.is_file()

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any]]:
        """The header of every weight file that is read, or would be of another variant."""
        if self.is_file:
            return {self.path: files.read_header(self.path)}
        paths = [path for there in self._weights.values() for some in there.values() for path in some]
        return {path: files.read_header(path) for path in dict.fromkeys(paths)}

    @cached_property
    def _weights(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Of every component of a folder the weight files by variant, the one that is read first.

        Variants that are not read and could not be, cut short or pointers of Git LFS, are none.
        """
        found = {}
        kinds = components(self.path)
        for part, read in read_variants(self.path, self.variant).items():
            there = weight_files(self.path / part, kinds[part][0])
            found[part] = {read: there.pop(read)}
            for variant, paths in there.items():
                with contextlib.suppress(ExpungeError):
                    for path in paths:
                        files.read_header(path)
                    found[part][variant] = paths
        return found

    def size(self, component: str = "") -> int:
        """The bytes of all weights that are read, or of one component's."""
        if self.is_file:
            return self.path.stat().st_size
        parts = [component] if component else list(self._weights)
        read = (next(iter(self._weights.get(part, {"": ()}).values())) for part in parts)
        return sum(path.stat().st_size for some in read for path in some)

    def places(self, layer: str, parameter: str) -> list[tuple[Path, str]]:
        """The files that hold a parameter, and what they call it: one a variant of the weights.

        The first is the one that is read. A single file may hold a running mean beside it.

        Raises:
            ExpungeError: none does.
        """
        return list(self.by_variant(layer, parameter).values())

    def by_variant(self, layer: str, parameter: str) -> dict[str, tuple[Path, str]]:
        """As `places`, by variant: "" is the plain one, "model_ema" the running mean in a single file.

        Raises:
            ExpungeError: no file holds the parameter, or not that of the variant that is read.
        """
        component, _, inside = layer.partition(".")
        if self.is_file:
            header = self.headers[self.path]
            original = (
                self.family.ldm_layer_name(inside, self.config) if self._denoises(component) else None
            )
            if original is None:
                raise ExpungeError(
                    f"{layer} has no place of its own in a single file; export to a diffusers folder"
                )
            inner = f"{original}.{parameter}"
            wanted = {
                "": [f"{PREFIX}{inner}", inner],
                # The running mean's names have no dots: a name with one could be no buffer's.
                EMA.strip("."): [EMA + f"{PREFIX}{inner}".removeprefix("model.").replace(".", "")],
            }
            found = {
                variant: (self.path, name)
                for variant, names in wanted.items()
                for name in names
                if name in header
            }
        else:
            # Where transformers keeps a tower inside a model, and where it does not any more.
            inner = f"{inside}.{parameter}"
            names = {inner, f"text_model.{inner}", inner.removeprefix("text_model.")}
            weights = self._weights.get(component, {})
            found = {
                variant: (path, name)
                for variant, paths in weights.items()
                for path in paths
                for name in names & self.headers[path].keys()
            }
            if not found.keys() >= set(list(weights)[:1]):
                found = {}
        if not found or (self.is_file and "" not in found):
            raise ExpungeError(f"the edit does not fit: {self.name} has no {layer}.{parameter}")
        return found

    def _denoises(self, component: str) -> bool:
        return component == self.family.denoiser

    def read(self, layer: str, parameter: str = "weight") -> Tensor:
        """A parameter as it is stored; a scaled one multiplied by its scale."""
        path, name = self.places(layer, parameter)[0]
        return safetensors_io.read(path, name)

    def stored(self, layer: str, parameter: str, variant: str | None = None) -> safetensors_io.Stored:
        """A parameter of a variant as its file has it, with its scale; by default of what is read.

        Raises:
            ExpungeError: there is no such parameter, or none of that variant.
        """
        found = self.by_variant(layer, parameter)
        if variant is None:
            variant = next(iter(found))
        if variant not in found:
            raise ExpungeError(f"{self.name} has no {variant or 'plain'} weights of {layer}.{parameter}")
        return safetensors_io.stored(*found[variant])

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
        changed: Mapping[Place, Change],
        erased: Sequence[Erased],
        beside: Mapping[str, str | Callable[[], str]] | None = None,
        of_variants: Mapping[str, Mapping[Place, Change]] | None = None,
    ) -> None:
        """Write the model to `output` with some parameters changed, one at a time in memory.

        Every variant of the weights is changed, and so is a single file's running mean: none keeps what
        was erased.

        Args:
            output: a file for a file, a new folder for a folder.
            changed: what becomes of parameters; everything else is copied byte for byte.
            erased: what the copy says has been erased from it.
            beside: texts of further files in the folder, by their names; a function is asked at the end.
            of_variants: what becomes of the parameters of a variant, where it is something else.

        Raises:
            ExpungeError: a parameter is missing, the disk is too full, or `output` cannot be written.
        """
        by_file: dict[Path, dict[str, Change]] = {}
        for place, change in changed.items():
            for variant, (path, name) in self.by_variant(*place).items():
                own = (of_variants or {}).get(variant, {}).get(place, change)
                by_file.setdefault(path, {})[name] = own
        note = json.dumps([dataclasses.asdict(one) for one in erased])
        if self.is_file:
            said = self.headers[self.path].get("__metadata__", {})
            safetensors_io.copy(
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
                safetensors_io.copy(path, folder / path.relative_to(self.path), changes, {NOTE: note})
            file = folder / "expunge.json"
            settings = files.read_json(file) if file.is_file() else {}
            settings["erased"] = json.loads(note)
            file.write_text(json.dumps(settings, indent=1), "utf8")
            for name, text in (beside or {}).items():
                (folder / name).write_text(text() if callable(text) else text, "utf8")

    def _files(self) -> list[Path]:
        """The files that make a diffusers folder: its components' and those beside them.

        Left out are weights that are not safetensors, weights of a component that no variant reads (they
        would keep what is erased), and what is hidden.
        """
        left_out = (*PICKLES, ".msgpack", ".onnx", ".onnx_data", ".h5")
        parts = {
            name for name in files.read_json(self.path / "model_index.json") if not name.startswith("_")
        }

        def belongs(path: Path) -> bool:
            place = path.relative_to(self.path).parts
            if path.suffix.lower() in left_out or any(name.startswith(".") for name in place):
                return False
            weights = path.suffix.lower() == ".safetensors"
            if len(place) == 1:
                return not weights
            return place[0] in parts and not (weights and place[0] in self._weights and path not in read)

        read = set(self.headers)
        return [path for path in sorted(self.path.rglob("*")) if path.is_file() and belongs(path)]


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
        new["modelspec.title"] = f"{was['modelspec.title']} without {join_names(names, 3)}"
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
