"""Which base model a LoRA is for, in the metadata of kohya's trainers and of ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from expunge.base import registry
from expunge.checkpoints.lora.programs import get_naming

if TYPE_CHECKING:
    from expunge.model import Model

TITLES_BY_ARCHITECTURE = {"stable-diffusion-3": "SD 3"}
"""How ModelSpec's architectures begin that exist in more versions than a family lists."""

TITLES_BY_VERSION = {
    "sdxl": "SDXL", "sd3": "SD 3", "flux": "FLUX.1", "sd_v2": "Stable Diffusion 2.x",
}  # fmt: skip
"""How `ss_base_model_version` begins where kohya's trainers wrote it, and the base that it means."""


def describe_base(family: type[Model], variant: str = "") -> dict[str, str]:
    """Describe a LoRA's base model in metadata; empty where the family states none.

    A1111 and Forge hide LoRAs without these, or show them beside the wrong base.

    Args:
        family: the model's family.
        variant: which of its base models, as `Model.infer_variant` returns it.

    >>> from expunge.base import registry
    >>> describe_base(registry.get("families", "stable_diffusion"), "2")["ss_v2"]
    'True'
    """
    bases = get_naming(family).bases
    base = bases.get(variant) or bases.get("")
    if base is None:
        return {}
    return {
        "ss_base_model_version": base.version,
        "ss_v2": str(base.version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": base.implementation,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
    }


def read_base_title(metadata: Mapping[str, str]) -> str:
    """Read from a LoRA's metadata which base model it is for; "" where they do not say."""
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    families = (registry.get("families", name) for name in registry.list_names("families"))
    for base in (base for family in families for base in get_naming(family).bases.values()):
        if architecture == base.architecture:
            return base.title
    for start, title in TITLES_BY_ARCHITECTURE.items():
        if architecture.startswith(start):
            return title
    version = metadata.get("ss_base_model_version", "")
    for start, title in TITLES_BY_VERSION.items():
        if version.startswith(start):
            return title
    if metadata.get("ss_v2") == "True":
        return "Stable Diffusion 2.x"
    # `ss_v2` or a version that names nothing else: the trainers' first base.
    return "Stable Diffusion 1.x" if version or metadata.get("ss_v2") == "False" else architecture
