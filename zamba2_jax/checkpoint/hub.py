"""Where the files of a checkpoint are."""

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from zamba2_jax.storage.local import local_copy

CHECKPOINT = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")
"""The files of a checkpoint, as patterns."""


def local_directory(source: str | os.PathLike[str], patterns: Sequence[str] = CHECKPOINT) -> Path:
    """The directory of a checkpoint, fetched from its object store or from the hub if it is not on this machine.

    Args:
        source: a directory, the URL of one in an object store, or the id of a repository.
        patterns: of the files to fetch.

    Raises:
        FileNotFoundError: there is no such directory or repository.
        OSError: the store refuses, or cannot be reached.
    """
    source = local_copy(source, patterns)
    if Path(source).is_dir():
        return Path(source)
    repository = os.fspath(source)
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise FileNotFoundError(f"{repository} is neither a directory nor the id of a hub repository") from None
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except OSError as error:  # every error of the hub is one: offline, not found, no access
        raise FileNotFoundError(
            f"{repository} is not a directory here, is not in the local hub cache, and could not be fetched from the "
            f"hub (offline, or no such repository?): {error}"
        ) from error
