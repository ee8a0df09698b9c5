"""A model on the disk, a diffusers folder or a single file: read and copied tensor by tensor.

Parameters are named by their layer and their own name, as changes name them, whatever the files call
their tensors.
"""

from __future__ import annotations

import contextlib
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
from expunge.base.errors import ExpungeError
from expunge.base.quiet import silence_libraries
from expunge.changes import WeightChange
from expunge.checkpoints import erasure_notes, loading, pipelines, safetensors_io
from expunge.checkpoints.erasure_notes import NOTE, ErasureNote
from expunge.checkpoints.load import choose_device
from expunge.checkpoints.lora import read_lora
from expunge.checkpoints.lora.keys import name_text_layer
from expunge.checkpoints.safetensors_io import StoredTensor, TensorUpdate
from expunge.checkpoints.variants import PICKLES, find_weight_files, read_components, read_variants
from expunge.checkpoints.weight_changes import Place
from expunge.edit import Edit
from expunge.fingerprint import ParameterReader, is_same_base, list_places
from expunge.model import Model
from expunge.ops.rounding import RoundingCost

DENOISER_PREFIX = "model.diffusion_model."
"""How the denoiser's tensors begin in a single file that holds more than the denoiser."""

EMA_PREFIX = "model_ema."
"""How the moving average of the denoiser's tensors begins, where a single file holds it."""

OTHER_WEIGHTS = (*PICKLES, ".msgpack", ".onnx", ".onnx_data", ".h5")
"""The endings of weights in other formats, which are not copied: they would keep what is erased."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, and its family.

    >>> Checkpoint.find("emoji").family.__name__
    'StableDiffusion'
    """

    path: Path
    """A diffusers folder, or a single file."""
    name: str
    """The model's name."""
    family: type[Model]
    """The model's family."""
    config: Mapping[str, Any]
    """The denoiser's configuration, or what the names of a single file's tensors tell of it."""
    variant: str | None = None
    """The variant of a folder's weights that is read where it is there; else the plain ones."""

    @classmethod
    def find(cls, model: str | Path, *, weights: bool = True, variant: str | None = None) -> Checkpoint:
        """Find the files of a shipped model, a diffusers folder, a single file, or a hub id.

        Args:
            model: its name.
            weights: whether to download the weights of a model of the hub; otherwise only its
                configurations.
            variant: which variant of a folder's weights to read, as in `load`.

        Raises:
            ExpungeError: there is no such model, its family is not known, or a file is broken.
        """
        source = loading.fetch_source(loading.find_source(model, variant), weights=weights)
        path = source.path
        if path is None:
            raise TypeError(f"a model on this machine is expected, and {source.name} is one of the hub")
        if source.is_file:
            family = loading.find_family_of_file(path)
            config = family.infer_config(list(files.read_header(path)))
            return cls(path, source.name, family, config)
        family = loading.find_family(str(loading.read_index(path)["_class_name"]))
        config = files.read_json(path / family.denoiser / "config.json")
        return cls(path, source.name, family, config, variant)

    def load_text_model(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", *, check: bool = True
    ) -> Model:
        """Load the text encoders alone, and leave the denoiser on the disk.

        A method that neither draws nor trains needs no more: its edit can be made, and exported, on a
        machine on which the whole model does not fit.

        Args:
            dtype: the dtype of the text encoders.
            device: where they run.
            check: whether to look for NaN and infinity in the weights on the disk, too.

        Raises:
            ExpungeError: it is a single file, or the text encoders cannot be read.
        """
        if self.is_file:
            raise ExpungeError(f"{self.path} is a single file, which diffusers reads whole")
        denoiser = self.family.denoiser
        source = loading.Source(self.name, self.path, self.variant)
        pipe = pipelines.read_pipeline(source, dtype, **{denoiser: None, "vae": None})
        with silence_libraries():
            pipe.to(choose_device(device))
        network = pipelines.build_empty(self.path, denoiser)
        torch.nn.Module.to(network, dtype)  # its own `to` warns of casts, and there is nothing to cast
        pipe.register_modules(**{denoiser: network})
        pipelines.check_whole(pipe, self.path, self.variant)
        for part in (denoiser, "vae") if check else ():
            for path in next(iter(self._weights.get(part, {"": ()}).values())):
                safetensors_io.check_file(path)
        model = self.family(pipe, self.name, loading.read_settings(source))
        model.stored = self.read
        return model

    @property
    def is_file(self) -> bool:
        """Whether the model is a single file."""
        return self.path.is_file()

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any]]:
        """The header of every weight file that is read under some variant."""
        if self.is_file:
            return {self.path: files.read_header(self.path)}
        paths = [path for there in self._weights.values() for some in there.values() for path in some]
        return {path: files.read_header(path) for path in dict.fromkeys(paths)}

    @cached_property
    def _weights(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Each component's weight files by variant, of a folder; the variant that is read is first."""
        found = {}
        kinds = read_components(self.path)
        for part, read in read_variants(self.path, self.variant).items():
            there = find_weight_files(self.path / part, kinds[part][0])
            found[part] = {read: there.pop(read)}
            for variant, paths in there.items():
                # Variants that are cut short, or pointers of Git LFS, could not be read by anybody.
                with contextlib.suppress(ExpungeError):
                    for path in paths:
                        files.read_header(path)
                    found[part][variant] = paths
        return found

    def count_bytes(self, component: str = "") -> int:
        """Count the bytes of all weights that are read, or of one component's."""
        if self.is_file:
            return self.path.stat().st_size
        parts = [component] if component else list(self._weights)
        read = (next(iter(self._weights.get(part, {"": ()}).values())) for part in parts)
        return sum(path.stat().st_size for some in read for path in some)

    def locate(self, layer: str, parameter: str) -> dict[str, tuple[Path, str]]:
        """Locate a parameter in the files: the file and the tensor's name there, by variant.

        The first variant is the one that is read; "" is the plain one, and "model_ema" the moving
        average in a single file.

        Args:
            layer: the layer's name, with the component before it.
            parameter: the parameter's own name.

        Raises:
            ExpungeError: no file holds the parameter, or not in the variant that is read.
        """
        component, _, inside = layer.partition(".")
        if self.is_file:
            header = self.headers[self.path]
            original = (
                self.family.ldm_layer_name(inside, self.config) if self._is_denoiser(component) else None
            )
            if original is None:
                raise ExpungeError(
                    f"{layer} has no place of its own in a single file; export to a diffusers folder"
                )
            inner = f"{original}.{parameter}"
            # torch's buffers take no dots in their names, so the moving average's have none.
            ema = EMA_PREFIX + f"{DENOISER_PREFIX}{inner}".removeprefix("model.").replace(".", "")
            wanted = {"": [f"{DENOISER_PREFIX}{inner}", inner], EMA_PREFIX.strip("."): [ema]}
            found = {
                variant: (self.path, name)
                for variant, names in wanted.items()
                for name in names
                if name in header
            }
        else:
            # transformers keeps CLIP's tower in `text_model`, or does not, depending on its version.
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

    def read(self, layer: str, parameter: str = "weight") -> Tensor:
        """Read a parameter in its dtype; a scaled one multiplied by its scale, in float32."""
        path, name = next(iter(self.locate(layer, parameter).values()))
        return safetensors_io.read_tensor(path, name)

    def read_stored(self, layer: str, parameter: str, variant: str | None = None) -> StoredTensor:
        """Read a parameter as its file stores it, with its scale.

        Args:
            layer: the layer's name, with the component before it.
            parameter: the parameter's own name.
            variant: the variant; by default the one that is read.

        Raises:
            ExpungeError: there is no such parameter, or none of that variant.
        """
        found = self.locate(layer, parameter)
        if variant is None:
            variant = next(iter(found))
        if variant not in found:
            raise ExpungeError(f"{self.name} has no {variant or 'plain'} weights of {layer}.{parameter}")
        return safetensors_io.read_stored(*found[variant])

    def shape(self, layer: str, parameter: str = "weight") -> tuple[int, ...]:
        """Return the shape of a parameter."""
        path, name = next(iter(self.locate(layer, parameter).values()))
        return tuple(self.headers[path][name]["shape"])

    def fits(self, edit: Edit, read: ParameterReader | None = None) -> bool:
        """Return whether an edit was made from just these weights, as `Edit.fits` does for a model.

        Args:
            edit: the edit.
            read: returns the model's parameters with what is applied beneath the edit; by default as
                they are stored.

        Raises:
            ExpungeError: the model is of another family or another shipped one, or a layer is missing or
                has another shape.
        """
        edit.require_family(self.family)
        edit.require_shipped(self.name)
        for change in edit.changes:
            for layer in change.layers:
                shape = self.shape(layer, change.parameter)
                if not change.fits(torch.Size(shape)):
                    found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in change.tensors.items())
                    raise ExpungeError(
                        f"the edit does not fit: {layer} is {shape} in {self.name},"
                        f" and its {change.kind} change has {found}"
                    )
        return is_same_base(read or self.read, list_places(edit.changes), edit.record.base)

    def name_by_kohya(self, layer: str) -> str | None:
        """Return a layer's name in a LoRA of kohya's naming; None where it has none."""
        component, _, inside = layer.partition(".")
        if self._is_denoiser(component):
            return self.family.kohya_layer_name(inside, self.config)
        return name_text_layer(layer, self.family, "kohya")

    def infer_variant(self) -> str:
        """Infer which of its family's base models it is built like, as `Model.infer_variant` does."""
        file = self.path / "scheduler" / "scheduler_config.json"
        prediction = files.read_json(file).get("prediction_type") if file.is_file() else None
        entries = (item for header in self.headers.values() for item in header.items())
        tensors = {name: entry["shape"] for name, entry in entries if name != "__metadata__"}
        return self.family.infer_variant(self.config, tensors, prediction or "")

    def read_lora(self, path: str | Path, scale: float = 1.0) -> tuple[WeightChange, ...]:
        """Read a LoRA file for this model, as changes.

        Args:
            path: the LoRA's file.
            scale: its strength.

        Raises:
            ExpungeError: it is not a LoRA for this model.
        """
        import diffusers

        changes = read_lora(path, getattr(diffusers, self.family.pipelines[0]), self.config, scale)
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

    def read_erasures(self) -> tuple[ErasureNote, ...]:
        """Read what expunge erased from the model, the latest last.

        Raises:
            ExpungeError: the notes cannot be read.
        """
        if self.is_file:
            return erasure_notes.read_notes(self.headers[self.path])
        file = self.path / "expunge.json"
        entries = files.read_json(file).get("erased", []) if file.is_file() else []
        return erasure_notes.parse_notes(entries, file)

    def copy(
        self,
        output: str | Path,
        updates: Mapping[Place, TensorUpdate],
        notes: Sequence[ErasureNote],
        extra_files: Mapping[str, str | Callable[[], str]] | None = None,
        variant_updates: Mapping[str, Mapping[Place, TensorUpdate]] | None = None,
        cost: RoundingCost | None = None,
    ) -> None:
        """Copy the model with some parameters changed, one of them at a time in memory.

        Every variant of the weights is changed, and so is a single file's moving average, since any of
        them would keep what was erased.

        Args:
            output: a file for a single file, a new folder for a folder.
            updates: the new values of parameters; everything else is copied byte for byte.
            notes: what has been erased from the copy.
            extra_files: texts of further files in the folder, by their names; functions are called when
                everything else is written.
            variant_updates: the new values of a variant's parameters, where they differ from `updates`.
            cost: what the rounding of scaled tensors is added to.

        Raises:
            ExpungeError: a parameter is missing, the disk is too full, or `output` cannot be written.
        """
        by_file: dict[Path, dict[str, TensorUpdate]] = {}
        for place, update in updates.items():
            for variant, (path, name) in self.locate(*place).items():
                own = (variant_updates or {}).get(variant, {}).get(place, update)
                by_file.setdefault(path, {})[name] = own
        note = erasure_notes.serialise_notes(notes)
        if self.is_file:
            metadata = self.headers[self.path].get("__metadata__", {})
            safetensors_io.copy_file(
                self.path,
                output,
                by_file.get(self.path, {}),
                {NOTE: note, **erasure_notes.update_metadata(metadata, notes)},
                cost,
            )
            return
        others = [path for path in self._list_files() if path not in by_file]
        needed = sum(path.stat().st_size for path in [*others, *by_file])
        files.check_space(Path(output).absolute().parent, needed)
        with files.replacing_folder(output) as folder:
            for path in others:
                target = folder / path.relative_to(self.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            for path, some in by_file.items():
                target = folder / path.relative_to(self.path)
                safetensors_io.copy_file(path, target, some, {NOTE: note}, cost)
            file = folder / "expunge.json"
            settings = files.read_json(file) if file.is_file() else {}
            settings["erased"] = json.loads(note)
            file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            for name, text in (extra_files or {}).items():
                (folder / name).write_text(text() if callable(text) else text, encoding="utf-8")

    def _is_denoiser(self, component: str) -> bool:
        return component == self.family.denoiser

    def _list_files(self) -> list[Path]:
        """The files of a diffusers folder that are copied: its components' and those beside them.

        Weights in other formats, and those that no variant reads, are left out: they would keep what is
        erased. So are hidden files.
        """
        index = files.read_json(self.path / "model_index.json")
        parts = {name for name in index if not name.startswith("_")}
        read = set(self.headers)

        def belongs(path: Path) -> bool:
            place = path.relative_to(self.path).parts
            if path.suffix.lower() in OTHER_WEIGHTS or any(name.startswith(".") for name in place):
                return False
            weights = path.suffix.lower() == ".safetensors"
            if len(place) == 1:
                return not weights
            return place[0] in parts and not (weights and place[0] in self._weights and path not in read)

        return [path for path in sorted(self.path.rglob("*")) if path.is_file() and belongs(path)]
