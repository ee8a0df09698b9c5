"""Ladders of budgets: an attack at each strength that a suite asks for, the weakest first.

`all` stands for every attack's first ladder, but for those that the model's family cannot have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.attack import Attack
from expunge.base import fields, registry
from expunge.base.errors import ExpungeError, UnknownNameError, find_nearest
from expunge.base.fields import format_value
from expunge.evaluation.suite import Suite
from expunge.model import Model

ALL = "all"
"""What stands for every attack's first ladder."""


@dataclass(frozen=True)
class Ladder:
    """An attack at several budgets."""

    name: str
    """The attack's, or "NAME:LADDER"."""
    fields: Mapping[str, Any]
    """The attack's, but for the one that the budgets run over."""
    rungs: Mapping[str, Attack]
    """The attack at each budget, by the budget in words."""
    amounts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Each budget as a number, the weakest first; empty where budgets are words."""


def choose_ladders(
    suite: Suite, attacks: Sequence[str | Attack], model: Model | None = None
) -> tuple[list[Ladder], dict[str, str]]:
    """Return the ladders that are asked for, and of all others why they are not among them.

    Args:
        suite: whose budgets have precedence over the attacks' own.
        attacks: names, "NAME:LADDER", `all`, or attacks as they are.
        model: what they must be possible on; without one, that is not looked at.

    Returns:
        The ladders; then {name: reason} of every ladder known that is not run. The reason is empty
        where it was only not asked for.

    Raises:
        ExpungeError: as `read_ladder`; an attack is named twice; one that is named is not possible on
            the model, or names a file that does not fit it.
    """
    named = [read_ladder(suite, attack) for attack in attacks if attack != ALL]
    for ladder in named:
        # What is named must be possible; of `all`, the impossible is only listed with its reason.
        if reason := _find_obstacle(ladder, model):
            raise ExpungeError(f"the attack {ladder.name} cannot be made on this model: {reason}")
    taken, impossible = [ladder.name for ladder in named], {}
    if len(set(taken)) < len(taken):
        raise ExpungeError("an attack is named twice")
    found = named
    if ALL in attacks:
        every = [
            read_ladder(suite, _first_ladder(suite, name, cls))
            for name, cls in registry.load_all("attacks").items()
        ]
        impossible = {one.name: reason for one in every if (reason := _find_obstacle(one, model))}
        found = named + [one for one in every if one.name not in (*taken, *impossible)]
    for attack in (attack for ladder in found for attack in ladder.rungs.values()):
        if model is not None:
            attack.check_inputs(model)
    names = [ladder.name for ladder in found]
    rest = [name for name in dict.fromkeys((*_known(suite), *impossible)) if name not in names]
    return found, {name: impossible.get(name, "") for name in rest}


def _first_ladder(suite: Suite, name: str, cls: type[Attack]) -> str:
    """The name of an attack's first ladder: its plain one, where the suite or it has such a one."""
    if name in suite.attacks or "" in cls.ladders or not cls.ladders:
        return name
    return f"{name}:{next(iter(cls.ladders))}"


def _find_obstacle(ladder: Ladder, model: Model | None) -> str:
    """Why an attack cannot be made on a model; "" where it can, or there is no model."""
    if model is None:
        return ""
    try:
        for attack in ladder.rungs.values():
            attack.require(model)
    except ExpungeError as error:
        return str(error)
    return ""


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
    check_attack_name(attack)
    cls: type[Attack] = registry.get("attacks", name)
    table = suite.attacks.get(attack) or cls.ladders.get(rung)
    if table is None and not rung and not cls.ladders:
        alone = cls()
        return Ladder(attack, dataclasses.asdict(alone), {_spell(alone): alone})
    lists = {key: value for key, value in (table or {}).items() if isinstance(value, list)}
    # Budgets run over one field: a grid has no order from weak to strong, and ASR accumulates along it.
    if len(lists) != 1 or not all(lists.values()):
        known = [key for key in _known(suite) if key != attack]
        quoted = f'"{attack}"' if rung else attack
        near = find_nearest(attack, (one for one in known if ":" in one), 0.85) if rung else ""
        hint = f"did you mean {near!r}? Or " if near and table is None else ""
        raise ExpungeError(
            f"suite {suite.name} has no budgets for the attack {attack}: {hint}write one list in"
            f" [attacks.{quoted}], such as steps = [50, 150]; there are some for {', '.join(known)}"
        )
    ((field, values),) = lists.items()
    # Python counts False as 0; a field that is switched off may well be an attack.
    if any(value == 0 for value in values if not isinstance(value, bool)):
        raise ExpungeError(
            f"suite {suite.name}: the attack {attack} at {field} 0 changes nothing, so it would show"
            " nothing; every budget must be above 0"
        )
    rest = {key: value for key, value in (table or {}).items() if key != field}
    numbers = all(isinstance(value, (int, float)) for value in values)
    # From weak to strong, for ASR counts what came back at a weaker budget, too; words stay as written.
    rungs = {
        f"{field} {value:g}" if numbers else f"{field} {value}": fields.build(
            cls, {**rest, field: value}, attack
        )
        for value in (sorted(values, reverse=cls.smaller_is_stronger) if numbers else values)
    }
    for budget, one in rungs.items():
        if one.changes_nothing:
            raise ExpungeError(
                f"suite {suite.name}: the attack {attack} at {budget} changes nothing, so it would show"
                " nothing; every budget must be above 0"
            )
    first = dataclasses.asdict(next(iter(rungs.values())))
    amounts = {budget: getattr(one, field) for budget, one in rungs.items()} if numbers else {}
    return Ladder(attack, {k: v for k, v in first.items() if k != field}, rungs, amounts)


def check_attack_name(attack: str) -> None:
    """Check that there is such an attack, importing none; what follows a colon is not looked at.

    Raises:
        ExpungeError: there is none; the nearest is named.
    """
    name, colon, _ = attack.partition(":")
    if name == ALL and colon:
        raise ExpungeError(
            f"{ALL} is every attack's first ladder and has no ladders of its own, so not {attack!r}"
        )
    if attack != ALL and name not in (known := registry.list_names("attacks")):
        raise UnknownNameError("attack", name, [*known, ALL])


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
