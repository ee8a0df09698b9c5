"""The Hugging Face hub: downloads, uploads, and its errors in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

from expunge.base.errors import ExpungeError

VARIANTS = ("fp16", "bf16", "fp32", "non_ema", "ema")
"""The variants of weights that repositories hold beside the plain ones."""


def is_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def explain_failure(name: str, error: Exception) -> ExpungeError:
    """Explain in a sentence why a model could not be downloaded.

    Args:
        name: the model's OWNER/NAME.
        error: what the hub's library raised.
    """
    kinds = _list_classes(error)
    if "GatedRepoError" in kinds:
        return ExpungeError(
            f"{name} is gated: accept its licence on huggingface.co/{name}, and log in by hf auth login"
        )
    if "RepositoryNotFoundError" in kinds:
        return ExpungeError(f"the hub has no model {name}, or it is private and you are not logged in")
    if is_unreachable(error):
        if is_offline():
            return ExpungeError(
                f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to download it"
            )
        return ExpungeError(f"{name} is not on this machine, and the hub does not answer")
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ExpungeError(f"cannot load {name}: {reason}")


def download(model: str, *, weights: bool = True, variant: str | None = None) -> Path:
    """Download a model, unless it is on this machine already, and return its folder.

    Args:
        model: OWNER/NAME.
        weights: whether to download all files that are read; otherwise only the configurations.
        variant: a variant of the weights to download beside the plain ones; "*" for all.

    Raises:
        ExpungeError: it cannot be downloaded.
    """
    import huggingface_hub

    patterns = ["model_index.json", "expunge.json", "*/config.json"]
    if weights:
        patterns = ["*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "README.md", "LICENSE*"]
    # Variants are copies of the same weights, each as large as the plain ones.
    others = [name for name in VARIANTS if variant not in (name, "*")]
    ignored = [pattern for name in others for pattern in (f"*.{name}.*", f"*.{name}-*")]
    try:
        return Path(
            huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except Exception as error:  # the hub's library and the network raise errors of any kind
        raise explain_failure(model, error) from error


def is_unreachable(error: Exception) -> bool:
    """Return whether an error means that a file is neither on this machine nor to be downloaded."""
    kinds = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"}
    return bool(_list_classes(error) & kinds)


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder's files to a model repository, and return its address.

    Args:
        folder: the folder.
        repository: OWNER/NAME; it is created where it does not exist.
        private: whether a new repository is private.

    Raises:
        ExpungeError: the hub cannot be reached, or it refuses.
    """
    import huggingface_hub

    check_upload(repository)
    try:
        hub = huggingface_hub.HfApi()
        url = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the erased model")
    except Exception as error:  # the hub's library and the network raise errors of any kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExpungeError(f"cannot upload to {repository}: {reason}") from error
    return str(url)


def check_upload(repository: str) -> None:
    """Check before the work, not after it, that an upload can begin.

    Raises:
        ExpungeError: it cannot.
    """
    import huggingface_hub

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ExpungeError(f"a repository of the hub is called OWNER/NAME, not {repository!r}")
    if is_offline():
        raise ExpungeError("HF_HUB_OFFLINE forbids the upload; unset it")
    if huggingface_hub.get_token() is None:
        raise ExpungeError("the hub does not know you: log in with `hf auth login`, or set HF_TOKEN")


def _list_classes(error: BaseException) -> set[str]:
    """The names of the classes of an error and of the errors that caused it.

    By name, so that the hub's library is imported only where it is used.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return {kind.__name__ for one in chain for kind in type(one).__mro__}
