"""`expunge erase METHOD`: find an edit that erases concepts.

The method's fields are options of the command, so the method's name is read before the options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError, join_names
from expunge.base.fields import format_values
from expunge.base.shipped import DEFAULT_MODEL
from expunge.checkpoints import loading
from expunge.cli import concept_files
from expunge.cli.known_names import find_doubtful, match_names, read_names, warn_doubtful
from expunge.cli.loading_options import LoadingOptions
from expunge.cli.options import check_options, find_unknown_options, parse_options, read_value
from expunge.cli.spelling import announce_anchors, warn_unknown_words
from expunge.cli.terminal import make_plain_table, print_table, show_progress
from expunge.problem import Problem

if TYPE_CHECKING:
    from expunge.edit import Record
    from expunge.method import Method
    from expunge.model import Model
    from expunge.runtime.threads import Threads


@dataclass(frozen=True)
class EraseOptions:
    """Erase concepts from a model."""

    output: Annotated[str, arg(aliases=["-o"], metavar="EDIT")]
    """The file to write, ending in .safetensors."""
    concept: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="NAME[=ANCHOR]", help_behavior_hint="")
    ] = ()
    """A concept and what it becomes, once or more; NAME= is the empty prompt, NAME|SYNONYM=ANCHOR has a
    synonym."""
    concepts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A .txt, .csv or .toml file of concepts; in .txt one a line: NAME=ANCHOR or NAME=ANCHOR, KIND.
    LECO's prompts (.toml, .yaml) and ai-toolkit's sliders (.yaml) are read, too."""
    kind: str = "object"
    """The kind of concepts that name none: object, identity, style or explicit."""
    retain: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="PROMPT", help_behavior_hint="")
    ] = ()
    """A prompt whose images must stay as they are; once or more."""
    onto: Annotated[str | None, arg(metavar="EDIT", help_behavior_hint="")] = None
    """An edit to build on: what it erases stays erased, and the new file does both."""
    autotune: bool = False
    """Choose the method's strength on held-out prompts: the weakest that erases enough."""
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """A named set of the method's options; those given beside it count. `--preset list` lists them."""
    model: str = DEFAULT_MODEL
    """A shipped model, a diffusers folder, a single .safetensors file, or a hub id."""
    seed: int = 0
    """The seed of all random numbers."""
    ray: Annotated[str, arg(metavar="ADDRESS", help_behavior_hint="")] = ""
    """A Ray cluster to spread the work over: HOST:PORT, ray://HOST:PORT, auto, or local to start one."""
    loading: LoadingOptions = dataclasses.field(default_factory=LoadingOptions)


def run_erase(arguments: Sequence[str]) -> None:
    """Run `expunge erase`: read the method's name, then its options, then erase.

    Args:
        arguments: what follows `erase` on the command line.

    Raises:
        ExpungeError: an unknown method or option, or a problem that cannot be solved.
    """
    name = arguments[0] if arguments else "--help"
    known = registry.list_names("methods")
    if name in ("-h", "--help"):
        print("usage: expunge erase METHOD --concept NAME[=ANCHOR] -o EDIT …\n")
        width = max(map(len, known))
        print("\n".join(f"  {n:<{width}}  {registry.describe('methods', n)}" for n in known))
        print("\n  expunge erase METHOD --help    shows its options")
        return
    if name.startswith("-"):
        raise ExpungeError(f"name a method after erase, one of: {', '.join(known)}")
    if name not in known:
        raise UnknownNameError("method", name, known)
    command = f"erase {name}"
    preset = read_value(arguments, "--preset")
    if preset != "list" and not {"-h", "--help"} & set(arguments):
        # Importing a method imports torch, which takes seconds: first check what needs neither.
        try:
            with warnings.catch_warnings():
                # The problem is read again below; what it warns of is said once.
                warnings.simplefilter("ignore", ExpungeWarning)
                check_problem(parse_options(EraseOptions, command, arguments[1:], complete=False))
        except ExpungeError:
            # A misspelt option may be why something is missing: then name the option.
            if find_unknown_options(EraseOptions, arguments[1:]):
                with_method = _add_method_options(registry.get("methods", name)())
                check_options(with_method, command, arguments[1:])
            raise
    method = registry.get("methods", name)
    if preset == "list":
        _print_presets(name, method.presets)
        return
    options = _add_method_options(method.preset(preset) if preset is not None else method())
    parsed: Any = parse_options(options, command, arguments[1:])
    erase_concepts(parsed, parsed.method)


def check_problem(options: EraseOptions) -> Problem:
    """Return the problem to solve, having checked all that needs no torch.

    Raises:
        ExpungeError: the concepts, the model or the output file are not usable.
    """
    problem = concept_files.read_problem(options.concept, options.concepts, options.kind, options.retain)
    if not options.output.lower().endswith(".safetensors"):
        raise ExpungeError(f"an edit is a .safetensors file; {options.output} should end so")
    files.check_writable(options.output)
    source = loading.find_source(options.model, options.loading.variant)
    return match_names(problem, read_names(loading.read_settings(source)))


def erase_concepts(options: EraseOptions, method: Method) -> None:
    """Erase the concepts with a method, and write the edit."""
    problem = check_problem(options)
    from expunge.runtime import ray_backend, work_dir

    ray_backend.check_address(options.ray)
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.erasure import erase

    method.check_family(
        Checkpoint.find(options.model, weights=False, variant=options.loading.variant).family
    )
    onto = None
    if options.onto:
        from expunge.edit import Edit
        from expunge.erasing.onto import add_constraints

        onto = Edit.load(options.onto)
        add_constraints(problem, onto)  # a contradiction is said before the model is loaded
    if options.loading.dry_run:
        options.loading.print_estimate(options.model, lambda steps: method.estimate_cost(problem, steps))
        return
    # One step is enough to tell whether the method needs more than the text encoders.
    # To build on an edit, its weights have to be in memory.
    model = options.loading.load(options.model, None if onto else method.estimate_cost(problem, 1))
    source = loading.find_source(options.model, options.loading.variant)
    doubtful = find_doubtful(problem, read_names(loading.read_settings(source)))
    warn_doubtful(doubtful)
    warn_unknown_words(model, problem, but=doubtful)
    if method.reads_anchor:
        announce_anchors(model, problem)
    elif unused := [concept for concept in problem.erase if concept.anchor]:
        warnings.warn(
            f"{type(method).__name__}, as it is set, reads no anchor: what {unused[0].name!r} becomes is"
            f" left to the model, not {unused[0].anchor!r}",
            ExpungeWarning,
            stacklevel=1,
        )
    cost = method.estimate_cost(problem, model.num_inference_steps)
    folder = work_dir.find_work_dir(options.output)
    how: Any = {"seed": options.seed, "work": folder, "ray": options.ray, "onto": onto}
    try:
        with contextlib.ExitStack() as stack:
            threads = stack.enter_context(_choose_threads(model))
            plan = options.loading.announce_estimate(model, cost, problem.erase)
            pace = None
            if cost and not options.ray:  # on a cluster, other processes do the counted work
                from expunge.checkpoints.pace import Pace

                pace = Pace(model, plan.count_units(cost), plan.unit_seconds, plan.overhead(cost))
            show = stack.enter_context(show_progress(pace))
            if pace:
                pace.tell = show
                pace.listeners.append(lambda *_: threads.adjust())
                stack.enter_context(pace)
            progress = pace.progress if pace else show
            if options.autotune:
                from expunge.tuning import autotune

                edit = autotune(model, problem, method, progress=show, seed=options.seed, onto=onto)
            else:
                edit = erase(model, problem, method, progress=progress, **how)
    except KeyboardInterrupt:
        if Path(folder).is_dir():
            print(f"{folder} keeps what was finished; the same command goes on there", file=sys.stderr)
        raise
    edit.save(options.output)
    work_dir.remove(folder)
    names = join_names([concept.name for concept in problem.erase], 10)
    size = files.format_bytes(Path(options.output).stat().st_size)
    print(f"{options.output}: {names} erased in {edit.record.seconds:.1f} s, {size}")
    for one in edit.record.tuned.get("tries", ()):
        moved, drift = 100 * one["moved"], 100 * one["drift"]
        print(
            f"{edit.record.tuned['field']} {one['value']:g}: every concept moved by {moved:.0f} % of its"
            f" way or more, what stays by {drift:.1f} % of its norm"
        )
    for line in describe_moved(edit.record, method):
        print(line)


MOST_LINES = 10
"""How many concepts have a line of their own in what is printed of how far they moved."""


def describe_moved(record: Record, method: Method) -> list[str]:
    """Say how far each concept moved toward its anchor in held-out prompts; of many, the range alone.

    Args:
        record: of the edit.
        method: that made it.

    Returns:
        Lines. The last ones call the edit weak, with what to turn, where a concept moved by less than
        `WEAK` of the way, and a trained one unsure where it moved by less than `UNSURE`.
    """
    from expunge.erasing.moved_share import UNSURE, WEAK

    shares = record.moved
    anchors = {c.name: c.anchor if record.reads_anchor else "" for c in record.problem.erase}
    if len(shares) > MOST_LINES:
        low, high = (f"{100 * share:.0f}" for share in (min(shares.values()), max(shares.values())))
        lines = [f"moved {low} to {high} % of the way to their anchors on held-out prompts"]
    else:
        lines = [
            f"{name}: moved {100 * share:.0f} % of the way to {anchors[name] or 'the empty prompt'}"
            " on held-out prompts"
            for name, share in shares.items()
        ]
    if weak := [name for name, share in shares.items() if share < WEAK]:
        turn = method.stronger or "other values of the method's fields"
        lines.append(
            f"this edit is weak for {join_names(weak, 5)}: less than {100 * WEAK:.0f} % of the way;"
            f" try {turn}, or another preset or method"
        )
    unsure = [name for name, share in shares.items() if WEAK <= share < UNSURE]
    if unsure and method.measured_in == "predictions":
        lines.append(
            f"trained edits that moved a concept less than {100 * UNSURE:.0f} % of the way often still"
            f" draw it: evaluate this one for {join_names(unsure, 5)}"
        )
    return lines


def _choose_threads(model: Model) -> Threads:
    """Return the context that sets the number of CPU threads: one for a small network."""
    from expunge.checkpoints.cost_estimate import count_operations
    from expunge.runtime.threads import SMALL, Threads

    return Threads(small=count_operations(model) < SMALL)


def _add_method_options(default: Method) -> type[EraseOptions]:
    """Return the options of `expunge erase` with the fields of a method among them."""
    field: Any = ("method", type(default), dataclasses.field(default=default))
    options = dataclasses.make_dataclass("EraseWithMethod", [field], bases=(EraseOptions,), frozen=True)
    options.__doc__ = EraseOptions.__doc__
    return options


def _print_presets(method: str, presets: Mapping[str, Mapping[str, Any]]) -> None:
    table = make_plain_table()
    table.add_column(overflow="fold")
    for name, preset in presets.items():
        values = {field: value for field, value in preset.items() if field != "about"}
        table.add_row(name, preset.get("about", ""), format_values(values))
    print_table(table if presets else f"{method} has no presets")
