"""A second erasure, of something else, stacked on the first or merged with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from expunge.attack import Attack
from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.checkpoints.merge import merge
from expunge.edit import Edit
from expunge.erasing.concept_tokens import sample_words
from expunge.erasure import erase
from expunge.model import Model
from expunge.problem import Concept, Problem, normalize_name
from expunge.runtime.context import RunContext


@dataclass(frozen=True)
class SecondEdit(Attack):
    """Erase other things, too, from the erased model, as its users do.

    The second edit is a file's, or UCE's of some words that the first neither erases nor retains.
    `stacked` applies it over the first, whatever both change; `merged` makes one edit of the two, as
    `expunge merge` does: text layers that both change get weights that do what each does on its prompts.

    Cost: for one that is made here, a closed form; merging encodes the general captions.

    Source: ours; the merged weights are the fusion of MACE (Lu et al., CVPR 2024, arXiv 2403.06135).
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"how": ["stacked", "merged"]}}

    how: Literal["stacked", "merged"] = "stacked"
    """Whether the second is applied over the first, or both are merged into one."""
    file: str = ""
    """Another edit of the same base; by default UCE's of some other words."""
    num_words: int = bounded(3, at_least=1)
    """Words that the one made here erases."""

    def check_inputs(self, model: Model) -> None:
        if self.file:
            self.read_file(model)

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        other = self.read_file(model) if self.file else self.make_edit(model, edit, run)
        if self.how == "stacked" or not edit.changes:
            # The original with both is the original with the second.
            with model.using(edit, other):
                yield model
        else:
            with model.using(merge(model, [edit, other], progress=run.progress)):
                yield model

    def read_file(self, model: Model) -> Edit:
        """Read the second edit's file.

        Raises:
            ExpungeError: it is no edit, or one of another base.
        """
        edit = Edit.load(self.file)
        if not edit.fits(model):
            raise ExpungeError(f"the edit {self.file} was made from other weights than this model's")
        return edit

    def make_edit(self, model: Model, edit: Edit, run: RunContext) -> Edit:
        """Erase some other words from the original, with UCE.

        Args:
            model: the original.
            edit: says what is erased and what retained, which the second leaves alone.
            run: its seed chooses the words.

        Raises:
            ExpungeError: the tokenizer knows no other word.
        """
        problem = edit.record.problem
        kept = {normalize_name(text) for text in problem.retain}
        kept |= {normalize_name(c.anchor) for c in problem.erase if c.anchor}
        generator = run.generator("a second edit")
        words = sample_words(model, problem.erase, len(kept) + self.num_words, generator)
        words = [word for word in words if normalize_name(word) not in kept][: self.num_words]
        if not words:
            raise ExpungeError("the tokenizer knows no word to erase beside those of the first edit")
        concepts = tuple(Concept(word) for word in words)
        return erase(model, Problem(concepts, problem.retain), "uce", progress=run.progress)
