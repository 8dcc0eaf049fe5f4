"""From a run to a Hugging Face checkpoint."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from zamba2_jax.checkpoint.hf import save_hf
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer
from zamba2_jax.text.vocabulary import copy_tokenizer
from zamba2_jax.train.directory import CHECKPOINTS, TOKENIZER, read_run


def export(directory: Path, out: Path, step: int | None = None) -> int:
    """Writes the model and the tokenizer of a run's checkpoint as a Hugging Face checkpoint.

    The run may be going on. Nothing of the optimizer is read.

    Args:
        directory: of the run.
        out: directory to write, new or empty.
        step: of the checkpoint, the last one by default.

    Returns:
        The step.

    Raises:
        ValueError: the run or the checkpoint is not valid.
        OSError: there is none, or `out` holds something or cannot be written.
    """
    config, architecture = read_run(directory)
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        if step is None:
            if not checkpoints.steps:
                raise FileNotFoundError(f"{checkpoints.directory} holds no checkpoint yet")
            step = checkpoints.steps[-1]
        if config.model.hf is None and (directory / TOKENIZER).is_dir():
            architecture = with_token_ids(architecture, load_tokenizer(directory / TOKENIZER))
        like = jax.eval_shape(lambda: init_model(architecture, rngs=nnx.Rngs(0), dtype=config.dtype))
        model = checkpoints.restore_part(step, like, "model")
    save_hf(model, out)
    if (directory / TOKENIZER).is_dir():
        copy_tokenizer(directory / TOKENIZER, out)
    return step


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
