"""A text-to-image model: a diffusers pipeline, and what erasing asks of it."""

from expunge.model.contract import ANCHORS, FamilyContract
from expunge.model.model import HasChanges, Model
from expunge.model.prompt_checks import check_unicode, warn_truncated

__all__ = ["ANCHORS", "FamilyContract", "HasChanges", "Model", "check_unicode", "warn_truncated"]
