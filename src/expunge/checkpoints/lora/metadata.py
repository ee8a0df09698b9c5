"""PEFT's configuration of a LoRA, which diffusers writes into the file's metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError
from expunge.base.files import parse_json, read_json
from expunge.checkpoints.lora.keys import shorten


@dataclass(frozen=True)
class AdapterMetadata:
    """The fields of `lora_adapter_metadata`: one configuration, or one for each component."""

    fields: Mapping[str, Any]
    path: str | Path
    """The LoRA's file, for messages."""

    @classmethod
    def parse(cls, metadata: Mapping[str, str], path: str | Path) -> AdapterMetadata:
        """Parse a file's metadata.

        Raises:
            ExpungeError: `lora_adapter_metadata` is no JSON object.
        """
        # PEFT itself writes its configuration beside a file of this name.
        beside = Path(path).with_name("adapter_config.json")
        if "lora_adapter_metadata" not in metadata and Path(path).stem == "adapter_model":
            return cls(read_json(beside) if beside.is_file() else {}, path)
        try:
            fields = parse_json(metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ExpungeError(f"{path}: its lora_adapter_metadata cannot be read")
        return cls(fields, path)

    def get(self, component: str, name: str) -> Any:
        """Return a field of a component's configuration, or of the only one there is."""
        return self.fields.get(f"{component}.{name}", self.fields.get(name))

    def uses_dora(self, component: str) -> bool:
        """Return whether the component's LoRA is a DoRA."""
        return self._get_switch(component, "use_dora")

    def find_scale(self, layer: str, rank: int) -> float:
        """Find what multiplies a layer's factors: alpha / rank, or alpha / √rank for rsLoRA.

        Args:
            layer: the layer's name, with the component before it.
            rank: the rank of its factors.

        Raises:
            ExpungeError: a value is no number, or the rank is another than the metadata's.
        """
        component, _, inside = layer.partition(".")
        alpha = self._find_number(component, "alpha_pattern", "lora_alpha", inside)
        if alpha is None:
            return 1.0
        declared = self._find_number(component, "rank_pattern", "r", inside)
        if declared is not None and declared != rank:
            raise ExpungeError(
                f"{self.path}: its metadata say rank {declared:g} of {shorten(layer)}, which has {rank}"
            )
        # PEFT scales by the layer's own rank, and rsLoRA by its root, which keeps large ranks stable.
        return alpha / (rank**0.5 if self._get_switch(component, "use_rslora") else rank)

    def _get_switch(self, component: str, name: str) -> bool:
        """A field that is true or false; false where it is missing."""
        value = self.get(component, name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise ExpungeError(
            f"{self.path}: {name} of its metadata is {value!r}, and should be true or false"
        )

    def _find_number(self, component: str, pattern: str, name: str, inside: str) -> float | None:
        """A layer's own value where a pattern matches its name, else the common one, as in PEFT."""
        patterns = self.get(component, pattern)
        value = self.get(component, name)
        if not isinstance(patterns, dict | None):
            raise ExpungeError(f"{self.path}: {pattern} of its metadata should be a table of numbers")
        if patterns:
            for key, own in patterns.items():
                try:
                    matches = re.fullmatch(rf"(.*\.)?({key})", inside)
                except re.error:
                    raise ExpungeError(
                        f"{self.path}: {pattern} of its metadata has no pattern {key!r}"
                    ) from None
                if matches:  # PEFT, too, takes the first pattern that matches
                    value, name = own, f"{key!r} in {pattern}"
                    break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ExpungeError(
                f"{self.path}: {name} of its metadata is {value!r}, and should be a number"
            )
        return float(value)
