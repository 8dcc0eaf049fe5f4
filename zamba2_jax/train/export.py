"""From a run to a Hugging Face checkpoint."""

import dataclasses
import os
from pathlib import Path

import jax
from flax import nnx

from zamba2_jax.checkpoint.hf import save_hf
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.storage.local import check_new, write_directory
from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer
from zamba2_jax.text.vocabulary import copy_tokenizer
from zamba2_jax.train.directory import TOKENIZER, Place, look_at_run, read_run


def export(directory: str | os.PathLike[str], out: str | os.PathLike[str], step: int | None = None) -> int:
    """Writes the model and the tokenizer of a run's checkpoint as a Hugging Face checkpoint.

    The run may be going on. Nothing of the optimizer is read.

    Args:
        directory: of the run, local or the URL of one in an object store.
        out: directory to write, new or empty, local or in an object store.
        step: of the checkpoint, the last one by default.

    Returns:
        The step.

    Raises:
        ValueError: the run or the checkpoint is not valid.
        OSError: there is none, or `out` holds something or cannot be written.
    """
    check_new(out)
    with look_at_run(directory) as place:
        model, step = _read_model(place, step)

        def write(target: Path) -> None:
            save_hf(model, target)
            if (place.directory / TOKENIZER).is_dir():
                copy_tokenizer(place.directory / TOKENIZER, target)

        write_directory(out, write, last="config.json")
    return step


def _read_model(place: Place, step: int | None) -> tuple[LanguageModel, int]:
    """The model of a checkpoint, and its step."""
    config, architecture = read_run(place.directory)
    with place.checkpoints(read_only=True) as checkpoints:
        if step is None:
            if not checkpoints.steps:
                raise FileNotFoundError(f"{checkpoints.location} holds no checkpoint yet")
            step = checkpoints.steps[-1]
        if config.model.hf is None and (place.directory / TOKENIZER).is_dir():
            architecture = with_token_ids(architecture, load_tokenizer(place.directory / TOKENIZER))
        like = jax.eval_shape(lambda: init_model(architecture, rngs=nnx.Rngs(0), dtype=config.dtype))
        return checkpoints.restore_part(step, like, "model"), step


def with_token_ids(architecture: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The architecture with the special tokens of the tokenizer it was trained with, as far as it can be fed them."""

    def known(name: str) -> int | None:
        id_ = tokenizer.special_id(name)
        return None if id_ is None or id_ >= architecture.vocab_size else id_

    return dataclasses.replace(
        architecture,
        pad_token_id=known("pad_token"),
        bos_token_id=known("bos_token"),
        eos_token_id=known("eos_token"),
    )
