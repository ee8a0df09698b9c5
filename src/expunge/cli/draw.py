"""`expunge draw`: draw images, with or without edits."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from expunge.base import files
from expunge.base.errors import ExpungeError, ExpungeWarning, join_names
from expunge.base.shipped import DEFAULT_MODEL
from expunge.checkpoints import loading
from expunge.cli.loading_options import LoadingOptions
from expunge.cli.terminal import show_progress
from expunge.probe import Probe

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.evaluation.image_source import Request

LARGEST_GRID = 4096
"""How many images `draw` puts into one file."""


@dataclass(frozen=True)
class DrawOptions:
    """Draw images."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """The prompt."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER/")]
    """FILE.png for one grid of all images, or FOLDER/ for one PNG file an image."""
    number: Annotated[int, arg(aliases=["-n"])] = 1
    """How many images; image i has the seed SEED + i."""
    seed: int = 0
    """The seed of the first image."""
    edit: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="EDIT", help_behavior_hint="")] = ()
    """An edit to apply; may be given more than once."""
    model: str = DEFAULT_MODEL
    """A shipped model, a diffusers folder, a single .safetensors file, or a hub id."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Number of denoising steps; by default the model's own."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="")] = None
    """Guidance scale; by default the model's own."""
    loading: LoadingOptions = dataclasses.field(default_factory=LoadingOptions)


def run_draw(options: DrawOptions) -> None:
    """Run `expunge draw`."""
    from expunge.base import image_files

    probe = Probe.of(options.prompt, options.number, options.seed, options.steps, options.guidance)
    if not options.output:
        raise ExpungeError("-o is empty: name a file such as FILE.png, or FOLDER/")
    output = Path(options.output)
    to_folder = options.output.endswith("/") or output.is_dir()
    if not to_folder:
        image_files.check_ending(output)
        if options.number > LARGEST_GRID:
            raise ExpungeError(
                f"one grid holds up to {LARGEST_GRID} images, not {options.number};"
                " -o FOLDER/ takes more"
            )
    # All that can fail is checked before the imports below, which take seconds.
    files.check_writable(output / "0.png" if to_folder else output)
    loading.find_source(options.model, options.loading.variant)
    for path in options.edit:
        files.read_header(path)
    from expunge.edit import Edit
    from expunge.evaluation.image_cache import Cache
    from expunge.evaluation.image_source import Request, Source
    from expunge.families._latent import warn_of_guidance

    if options.loading.dry_run:
        from expunge.runtime.cost import Cost

        n, steps = options.number, options.steps
        # Two prompts (the prompt and the empty one) and, with guidance, two predictions a step.
        options.loading.print_estimate(options.model, lambda own: Cost(2, 2 * n * (steps or own)))
        return
    edits = tuple(Edit.load(path) for path in options.edit)
    model = options.loading.load(options.model)
    steps = probe.num_inference_steps or model.num_inference_steps
    guidance = model.guidance_scale if probe.guidance_scale is None else probe.guidance_scale
    requests = [
        Request(prompt, seed, steps, guidance)
        for prompt, seed in zip(probe.prompts, probe.seeds, strict=True)
    ]
    source = Source(model, edits)
    # Here, and not where images are drawn: the cache may have them.
    warn_of_guidance(model, guidance)
    with show_progress() as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model was distilled", ExpungeWarning)
        # A cache folder that cannot be written must not stop the drawing.
        images = Cache(required=False).draw(source, requests, progress)
    _check_finite(images, requests)
    if to_folder:
        for image, request in zip(images, requests, strict=True):
            name = f"{_make_file_name(request.prompt)}-{request.seed}-{source.address(request)[:8]}"
            image_files.save_unique(image_files.to_pil(image), output, name)
    else:
        image_files.save_image(image_files.make_grid(images), output)
    print(f"{options.output}: {len(probe)} image{'s' * (len(probe) > 1)} of {options.prompt!r}")


def _check_finite(images: Tensor, requests: Sequence[Request]) -> None:
    """Check that images hold numbers; warn where some do not, and files show them black.

    Raises:
        ExpungeError: none does.
    """
    broken = [r.seed for r, image in zip(requests, images, strict=True) if not image.isfinite().all()]
    if not broken:
        return
    which = join_names([str(seed) for seed in broken], 5)
    text = (
        f"the model draws NaN in place of an image with the seed {which}: try a smaller --guidance than"
        f" {requests[0].guidance_scale:g}, or --dtype float32"
    )
    if len(broken) == len(images):
        raise ExpungeError(text)
    warnings.warn(text, ExpungeWarning, stacklevel=2)


def _make_file_name(prompt: str, longest: int = 60) -> str:
    """Return a prompt's letters and digits for a file name, in its own script where that works.

    Args:
        prompt: the prompt.
        longest: the most bytes of the name, in UTF-8.
    """
    name = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).casefold()).strip("-")
    try:
        # File systems limit the length of a name in bytes, not in letters.
        name = name.encode("utf8")[:longest].decode("utf8", "ignore").strip("-")
        os.fsencode(name)
    except UnicodeEncodeError:  # the file system's encoding has no such letters
        name = files.make_slug(prompt, longest)
    return name or "image"
