"""Ladders of budgets: an attack at each strength that a suite asks for, the weakest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expunge.attack import Attack
from expunge.base import fields, registry
from expunge.base.errors import ExpungeError
from expunge.base.fields import format_value
from expunge.evaluation.suite import Suite


@dataclass(frozen=True)
class Ladder:
    """An attack at several budgets."""

    name: str
    """The attack's, or "NAME:LADDER"."""
    fields: Mapping[str, Any]
    """The attack's, but for the one that the budgets run over."""
    rungs: Mapping[str, Attack]
    """The attack at each budget, by the budget in words."""


def read_ladder(suite: Suite, attack: str | Attack) -> Ladder:
    """Return an attack at each budget of a suite, or of its own where the suite names none.

    An attack that has no ladders, and one that is given as an object, is judged once, as it is.

    Raises:
        ExpungeError: there is no such attack or ladder, or the suite gives it a field that it has not.
        TypeError: it is neither a name nor an attack.
    """
    if isinstance(attack, Attack):
        return Ladder(
            registry.name_of("attacks", type(attack)),
            dataclasses.asdict(attack),
            {_spell(attack): attack},
        )
    if not isinstance(attack, str):
        raise TypeError(f"an attack must be a name or an Attack, not {attack!r}")
    name, _, rung = attack.partition(":")
    cls: type[Attack] = registry.get("attacks", name)
    table = suite.attacks.get(attack) or cls.ladders.get(rung)
    if table is None and not rung and not cls.ladders:
        alone = cls()
        return Ladder(attack, dataclasses.asdict(alone), {_spell(alone): alone})
    lists = {key: value for key, value in (table or {}).items() if isinstance(value, list)}
    if len(lists) != 1 or not all(lists.values()):
        known = [key for key in _known(suite) if key != attack]
        quoted = f'"{attack}"' if rung else attack
        raise ExpungeError(
            f"suite {suite.name} has no budgets for the attack {attack}: write one list in"
            f" [attacks.{quoted}], such as steps = [50, 150]; there are some for {', '.join(known)}"
        )
    ((field, values),) = lists.items()
    rest = {key: value for key, value in (table or {}).items() if key != field}
    numbers = all(isinstance(value, (int, float)) for value in values)
    rungs = {
        f"{field} {value:g}" if numbers else f"{field} {value}": fields.build(
            cls, {**rest, field: value}, attack
        )
        for value in (sorted(values, reverse=cls.smaller_is_stronger) if numbers else values)
    }
    first = dataclasses.asdict(next(iter(rungs.values())))
    return Ladder(attack, {key: value for key, value in first.items() if key != field}, rungs)


def _known(suite: Suite) -> list[str]:
    """The ladders that a suite or an attack names."""
    own = [
        f"{name}:{rung}" if rung else name
        for name in registry.list_names("attacks")
        for rung in registry.get("attacks", name).ladders
    ]
    return list(dict.fromkeys((*suite.attacks, *own)))


def _spell(attack: Attack) -> str:
    """What tells an attack from one with its default fields, in words."""
    changed = [
        f"{field.name} {format_value(value)}"
        for field in dataclasses.fields(attack)
        if (value := getattr(attack, field.name)) != field.default
    ]
    return ", ".join(changed) or "as it is"
