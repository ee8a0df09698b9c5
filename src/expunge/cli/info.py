"""`expunge info` and `expunge list`: what an edit or a model says of itself, and what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, join_names
from expunge.base.fields import format_values
from expunge.cli.terminal import make_plain_table, print_table

if TYPE_CHECKING:
    from expunge.edit import Edit


@dataclass(frozen=True)
class InfoOptions:
    """Show what an edit erases, how it was made and from what, and whether it fits a model."""

    edit: Annotated[Positional[str], arg(metavar="EDIT|MODEL")]
    """The edit, or a model that export wrote."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model to check the edit against; by default the shipped one it was made from."""


@dataclass(frozen=True)
class ListOptions:
    """List what there is of a kind."""

    kind: Annotated[Positional[str], arg(metavar="KIND")] = "methods"
    """methods, models, families, attacks, metrics or suites."""
    include: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FOLDER", help_behavior_hint="")
    ] = ()
    """A folder of your own suites, found by their file names without .toml; once or more."""


def run_info(options: InfoOptions) -> None:
    """Run `expunge info`."""
    if is_model(options.edit):
        print_model(options.edit)
        return
    from expunge.changes import describe_text_encoders, summarize
    from expunge.edit import Edit

    edit = Edit.load(options.edit)
    record = edit.record
    table = make_plain_table()
    for concept in record.problem.erase:
        also = f" and {', '.join(concept.synonyms)}" if concept.synonyms else ""
        becomes = repr(concept.anchor) if concept.anchor else "what the empty prompt draws"
        becomes = f"becomes {becomes}" if record.reads_anchor else "its method read no anchor"
        table.add_row("erases", f"{concept.name}{also} ({concept.kind}); {becomes}")
    table.add_row("retains", ", ".join(record.problem.retain) or "nothing by name")
    if record.onto is not None:
        earlier = ", ".join(concept.name for concept in record.onto.problem.erase)
        table.add_row("onto", f"an edit by {record.onto.method} that erases {earlier}")
    table.add_row("method", f"{record.method}: {format_values(record.fields)}")
    table.add_row("made from", f"{record.model or 'an unnamed model'}, seed {record.seed}")
    table.add_row("took", f"{record.seconds:.1f} s")
    table.add_row("changes", summarize(edit.changes))
    for name, share in record.moved.items():
        table.add_row("moved", f"{name}: {share:.0%} of the way to its anchor, on held-out prompts")
    if text := describe_text_encoders(edit.changes):
        table.add_row("note", text)
    table.add_row(
        "versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())
    )
    table.add_row("hash", edit.hash[:16])
    table.add_row("fits", _describe_fit(edit, options.model))
    print_table(table)


def run_list(options: ListOptions) -> None:
    """Run `expunge list`."""
    names = registry.list_names(options.kind)
    table = make_plain_table()
    table.add_column(overflow="fold")
    for name in names:
        table.add_row(name, registry.describe(options.kind, name))
    print_table(table if names else f"no {options.kind} yet")
    if options.kind == "methods":
        heads, *rows = registry.tabulate_coverage()
        grid = make_plain_table()
        for row in (heads, *rows):
            grid.add_row(*row)
        print_table("")
        print_table(grid)
    if options.kind == "suites":
        print_table("\nA name alone, such as object, is the suite of the edit's model or of --model.")


def is_model(path: str) -> bool:
    """Whether a path is a model, not an edit: a shipped model, a folder, or a file without a record."""
    if files.is_dir(path) or path in registry.list_names("models"):
        return True
    return files.is_file(path) and "expunge" not in files.read_header(path).get("__metadata__", {})


def print_model(path: str) -> None:
    """Print what a model or a LoRA on the disk says of itself: its family, and what it has lost."""
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.checkpoints.erasure_notes import read_notes

    header = files.read_header(path) if Path(path).is_file() else {}
    if any("lora" in name for name in header):
        from expunge.checkpoints.lora import read_lora_info

        lora = read_lora_info(path)
        read = f"rank {lora.rank} on {lora.layers} layers" if lora.layers else "in a naming unknown here"
        rows = [("lora", f"{path}, {read}")]
        if lora.others:
            rows.append(("besides", f"{len(lora.others)} other tensors: {join_names(lora.others, 2)}"))
        rows.append(("for", lora.base or "it does not say which base"))
        history = read_notes(header)
    else:
        checkpoint = Checkpoint.find(path)
        kind = "single file" if checkpoint.is_file else "diffusers folder"
        rows = [("model", f"{checkpoint.name}, {checkpoint.family.__name__}, a {kind}")]
        history = checkpoint.read_erasures()
    for erased in history:
        record = erased.record
        concepts = ", ".join(
            f"{c.name} (becomes {c.anchor!r})" if record.reads_anchor else c.name
            for c in record.problem.erase
        )
        rows.append(("erased", f"{concepts} by {record.method}, seed {record.seed}"))
        rows.append(("", f"{len(erased.places)} tensors, edit {erased.edit[:16]}"))
    if not history:
        rows.append(("erased", "nothing that it says of"))
    for name, text in rows:
        print(f"{name:<8}{text}")


def _describe_fit(edit: Edit, model: str | None) -> str:
    """Return in words whether an edit fits a model; None is the one it was made from.

    Raises:
        ExpungeError: the model cannot be read.
    """
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.checkpoints.undo import iterate_variants

    name = model or edit.record.model
    if model is None and name not in registry.list_names("models"):
        return "name the model at hand with --model to see"
    try:
        fitting = [one for one in iterate_variants(Checkpoint.find(name)) if one.fits(edit)]
    except ExpungeError as error:
        if model is None or "does not fit" not in str(error):
            raise
        return f"no: {str(error).partition(': ')[2]}"
    if not fitting:
        return f"{name}, though made from other weights"
    variant = fitting[0].variant
    return f"{name}, made from it" + (f" (its variant {variant})" if variant else "")
