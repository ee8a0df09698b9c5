"""What the Hugging Face hub answers, in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

from expunge.base.errors import ExpungeError


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def refused(name: str, error: Exception) -> ExpungeError:
    """Why a model of the hub could not be had."""
    kinds = _kinds(error)
    if "GatedRepoError" in kinds:
        return ExpungeError(
            f"{name} is gated: accept its licence on huggingface.co/{name}, and log in by hf auth login"
        )
    if "RepositoryNotFoundError" in kinds:
        return ExpungeError(f"the hub has no model {name}, or it is private and you are not logged in")
    if absent(error):
        if offline():
            return ExpungeError(f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it")
        return ExpungeError(f"{name} is not on this machine, and the hub does not answer")
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ExpungeError(f"cannot load {name}: {reason}")


def fetch(model: str, *, weights: bool = True, variant: str | None = None) -> Path:
    """The folder of a model of the hub, fetched where it is not on this machine yet.

    Args:
        model: OWNER/NAME.
        weights: whether to fetch all that is read; otherwise, its configuration alone.
        variant: a variant of the weights to fetch beside the plain ones; "*" for every one.

    Raises:
        ExpungeError: it cannot be had.
    """
    import huggingface_hub

    patterns = ["model_index.json", "expunge.json", "*/config.json"]
    if weights:
        patterns = ["*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "README.md", "LICENSE*"]
    # Copies of what diffusers reads, whole and in shards.
    others = [name for name in ("fp16", "bf16", "fp32", "non_ema", "ema") if variant not in (name, "*")]
    variants = [pattern for name in others for pattern in (f"*.{name}.*", f"*.{name}-*")]
    try:
        return Path(
            huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=variants)
        )
    except Exception as error:  # whatever the hub and the network come up with
        raise refused(model, error) from error


def absent(error: Exception) -> bool:
    """Whether something failed because it is not on this machine and could not be fetched."""
    return bool(_kinds(error) & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"})


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder's files to a model repository of the hub, made if it is not there; its address.

    Raises:
        ExpungeError: the hub cannot be reached, or it refuses.
    """
    import huggingface_hub

    check_push(repository)
    try:
        hub = huggingface_hub.HfApi()
        url = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the erased model")
    except Exception as error:  # whatever the hub and the network come up with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExpungeError(f"cannot upload to {repository}: {reason}") from error
    return str(url)


def check_push(repository: str) -> None:
    """Find out before the work, not after it, whether an upload can begin.

    Raises:
        ExpungeError: it cannot.
    """
    import huggingface_hub

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ExpungeError(f"a repository of the hub is called OWNER/NAME, not {repository!r}")
    if offline():
        raise ExpungeError("HF_HUB_OFFLINE forbids the upload; unset it")
    if huggingface_hub.get_token() is None:
        raise ExpungeError("the hub does not know you: log in with `hf auth login`, or set HF_TOKEN")


def _kinds(error: BaseException) -> set[str]:
    """The names of what an error is, and of what it came from."""
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
