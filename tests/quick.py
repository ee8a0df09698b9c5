"""Every method with rough values, by `quick.toml`: what tests over the registry run."""

from pathlib import Path
from typing import Any

from expunge.base.fields import build
from expunge.base.files import read_toml
from expunge.base.registry import get
from expunge.method import Method

QUICK = read_toml(Path(__file__).with_name("quick.toml"))


def quick(name: str, **given: Any) -> Method:
    """The method of that name with its rough values, but for those that are given."""
    return build(get("methods", name), {**QUICK.get(name, {}), **given})


def options(name: str) -> list[str]:
    """The rough values of the method of that name as options of `expunge erase`."""
    values = QUICK.get(name, {}).items()
    return [word for field, value in values for word in (f"--{field.replace('_', '-')}", str(value))]
