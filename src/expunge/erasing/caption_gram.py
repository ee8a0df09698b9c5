"""The prior of closed forms: the mean Gram matrix of everyday captions' tokens; and the captions."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from expunge.base import registry
from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError
from expunge.base.files import find_cache_folder, read_header, replacing
from expunge.changes import encode_tensor
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.erasing.prompt_templates import GENERAL
from expunge.model import Model
from expunge.ops.least_squares import gram
from expunge.problem import Concept
from expunge.runtime.context import RunContext

BATCH = 64
"""How many captions are encoded together."""

VOCABULARY, WORDS = "vocabulary", 3000
"""The name of the captions that are made of the tokenizer's own words; and how many words, at most."""


@dataclass(frozen=True, eq=False)
class Prior:
    """The mean over captions of Σ e eᵀ, where e runs over all positions of a caption.

    With a mean, the weight of a prior of 1,000 captions is that of one of 600,000: the sum that papers
    use is `mean * count`. In units of a squared embedding.

    Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), the terms in eᵖ of eq. 2 and 7.
    """

    mean: Tensor
    """(d, d), float64, on the CPU; d is the width of the text embeddings."""
    count: int
    """How many captions it is the mean of."""


def compute_prior(model: Model, captions: Sequence[str], run: RunContext | None = None) -> Prior:
    """Compute the prior of some captions, or read it from the user's cache folder.

    The cache holds one file of 8 d² bytes for each set of captions and each text encoder, named by the
    hash of their content.

    Args:
        model: whose text encoder and tokenizer read them.
        captions: the captions; one that occurs twice counts twice. Those longer than the model's
            window are cut, with one warning.
        run: is told how far it is.

    Raises:
        ExpungeError: there is no caption.
    """
    run = run or RunContext()
    if not captions:
        raise ExpungeError("a prior needs captions, and there is none")
    file = find_cache_folder() / "priors" / f"{text_hash(model, captions)}.safetensors"
    if file.is_file():
        try:
            count = int(read_header(file)["__metadata__"]["count"])
            return Prior(safetensors.torch.load(file.read_bytes())["mean"], count)
        except (ExpungeError, safetensors.SafetensorError, KeyError, ValueError):
            pass  # a broken file is computed again
    made = _prior(model, captions, run)
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(
                safetensors.torch.save({"mean": made.mean}, {"count": str(made.count)})
            )
    except ExpungeError as error:
        warnings.warn(f"the prior is not kept for another time: {error}", ExpungeWarning, stacklevel=2)
    return made


def read_captions(source: str) -> tuple[str, ...]:
    """Read captions by name: a shipped set, a text file with one a line, or a data set of the hub.

    >>> len(read_captions("general")) >= 1000
    True

    Args:
        source: "general"; the path of a text file; or `OWNER/NAME[:COLUMN[:SPLIT]]`, read with the
            library `datasets`. The column may be left out where only one holds text; the split
            is "train" unless given.

    Raises:
        ExpungeError: there is no such source, it has no captions, or `datasets` is not installed.
    """
    shipped = {path.stem: path for path in (registry.HERE / "captions").glob("*.txt")}
    # A shipped name wins over a file of the same name without an ending.
    file = shipped.get(source, Path(source))
    data_set = re.fullmatch(r"[\w.-]+/[\w.-]+(:.*)?", source)
    if file.is_file():
        try:
            lines = file.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ExpungeError(f"{source} is not text in UTF-8") from None
        except OSError as error:
            raise ExpungeError(f"cannot read {source}: {error.strerror or error}") from error
    elif file.suffix.lower() == ".txt":
        raise ExpungeError(f"cannot read {source}: there is no such file")
    elif data_set:
        lines = _from_hub(source)
    else:
        raise UnknownNameError("set of captions", source, [*shipped, VOCABULARY])
    found = tuple(filter(None, (line.strip() for line in lines)))
    if not found:
        raise ExpungeError(f"{source} has no captions")
    return found


def read_captions_for(model: Model, source: str, erased: Sequence[Concept]) -> tuple[str, ...]:
    """Read captions as `read_captions`; for "vocabulary", make one of each word the tokenizer knows.

    Args:
        model: whose tokenizer knows words.
        source: "vocabulary", or what `read_captions` takes.
        erased: the concepts whose words are left out of a vocabulary.
    """
    if source != VOCABULARY:
        return read_captions(source)
    return tuple(GENERAL.format(word) for word in vocabulary_words(model, erased)[:WORDS])


def count_unread(model: Model | None, source: str, erased: Sequence[Concept] = ()) -> int:
    """Count the captions of a source that have to be encoded: 0 where their prior is in the cache.

    Those of a data set of the hub are not known before it has been fetched, and count 0.

    Args:
        model: the model that would read them; None for one that is not in memory: all have to be read.
        source: as `read_captions_for` takes it; "" for none.
        erased: as in `read_captions_for`.
    """
    if not source:
        return 0
    if source == VOCABULARY and model is None:
        return WORDS
    if source != VOCABULARY and not Path(source).is_file() and "/" in source:
        return 0
    found = read_captions(source) if model is None else read_captions_for(model, source, erased)
    kept = find_cache_folder() / "priors"
    if model is not None and kept.is_dir() and any(kept.iterdir()):
        return 0 if (kept / f"{text_hash(model, found)}.safetensors").is_file() else len(found)
    return len(found)


def _prior(model: Model, captions: Sequence[str], run: RunContext) -> Prior:
    # A text shorter in letters than the window is in tokens cannot be cut: no need to tokenize it.
    cut = sum(len(c) > model.window and model.count_tokens(c) > model.window for c in captions)
    if cut:
        warnings.warn(
            f"{cut} of {len(captions)} captions are longer than the model reads; they are cut",
            ExpungeWarning,
            stacklevel=3,
        )
    total: Tensor | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpungeWarning)  # one for each that is cut
        for start in range(0, len(captions), BATCH):
            run.progress("reading captions", start, len(captions))
            e = model.encode(captions[start : start + BATCH]).embeddings.flatten(0, 1).cpu()
            total = gram(e) if total is None else total + gram(e)
    run.progress("reading captions", len(captions), len(captions))
    if total is None:
        raise TypeError("captions must be a sequence of texts, not an empty one")
    return Prior(total / len(captions), len(captions))


def text_hash(model: Model, captions: Sequence[str]) -> str:
    """Hash all that a prior follows from: captions, text encoders' weights, tokenizers."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for caption in captions:
        # The zero byte parts captions: "a b" + "c" must not equal "a" + "b c".
        digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
    for name in ("max_sequence_length", "layers", "template"):  # how a language model is asked
        if hasattr(model, name):
            digest.update(f"{name}={getattr(model, name)}".encode())
    for name in model.read_ahead:
        for key, tensor in model.read_ahead_parameters(name).items():
            digest.update(f"{name}.{key}".encode() + encode_tensor(tensor))
    for name, part in sorted(model.pipe.components.items()):
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(key.encode() + encode_tensor(tensor))
        elif name.startswith("tokenizer") and part is not None:
            # The tokenizer as data, not its files: one that was changed in memory is another one.
            tokenizer = getattr(part, "tokenizer", part)  # a processor has one of its own
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state |= {"padding": None, "truncation": None}  # these are of the last call
            digest.update(json.dumps(state).encode())
    return digest.hexdigest()


def _from_hub(source: str) -> list[str]:
    """Read a column of text of a Hugging Face data set; a cell may hold several captions."""
    try:
        import datasets
    except ImportError:
        raise ExpungeError(
            f"reading the data set {source} needs the library datasets: pip install 'expunge[data]'"
        ) from None
    name, column, split = [*source.split(":", 2), "", ""][:3]
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the hub, the network and the data set's files come up with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExpungeError(f"cannot read the data set {name}: {reason}") from error
    if not column:
        texts = [c for c, feature in data.features.items() if getattr(feature, "dtype", "") == "string"]
        if len(texts) != 1:
            raise ExpungeError(
                f"say which column holds the captions, as in {name}:COLUMN:"
                f" {', '.join(data.column_names)}"
            )
        (column,) = texts
    if column not in data.column_names:
        raise UnknownNameError("column", column, data.column_names)
    cells = (cell if isinstance(cell, list) else [cell] for cell in data[column])
    return [str(text) for cell in cells for text in cell if text is not None]
