"""What `zamba2 generate` and `zamba2 chat` share: which model, and how its tokens are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from zamba2_jax.files import user_caches
from zamba2_jax.models.registry import read_config
from zamba2_jax.nn.config import ModelConfig

if TYPE_CHECKING:
    from zamba2_jax.inference.sampling import Sampling
    from zamba2_jax.models.base import LanguageModel
    from zamba2_jax.text.tokenizer import Tokenizer

Dtype = Literal["auto", "stored", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and how its tokens are chosen."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR_OR_REPO")]
    """Directory of a checkpoint, or its name on the Hugging Face hub."""
    dtype: Dtype = "auto"
    """What to compute in: "stored" is the dtype of the files; "auto" is float32 on CPU, else as stored."""
    temperature: float = 0.0
    """Tokens are drawn at this temperature; 0 takes the likeliest."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens; 0 or -1 is all of them."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest tokens that have this share of the probability."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are there already are less likely."""
    seed: int = 0
    """Of the draws."""
    capacity: int | None = None
    """Most tokens, prompt and continuation together, for which there is to be memory."""

    def sampling(self) -> Sampling:
        """How tokens are chosen.

        Raises:
            ValueError: a value is out of its range.
        """
        from zamba2_jax.inference.sampling import Sampling

        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    def open(self) -> Checkpoint:
        """All of the checkpoint but its weights, which are only looked for.

        Raises:
            FileNotFoundError: there is no such checkpoint, or it lacks a file.
            ValueError: a file of it, or `capacity`, is not valid.
        """
        from zamba2_jax.checkpoint.hf import find_entries, local_directory

        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"--capacity {self.capacity}: expected at least 1")
        directory = local_directory(self.model)
        config = read_config(directory)
        find_entries(directory)
        return Checkpoint(directory, config, self.dtype)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    directory: Path
    config: ModelConfig
    dtype: Dtype

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; raises as `load_tokenizer`."""
        from zamba2_jax.text.tokenizer import load_tokenizer

        return load_tokenizer(self.directory)

    def stop_tokens(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """The ids that end a text, as far as the model knows them."""
        from zamba2_jax.text.tokenizer import stop_tokens

        ends = stop_tokens(self.directory) if tokenizer is None else tokenizer.end_tokens
        return tuple(id_ for id_ in ends if id_ < self.config.vocab_size)

    def load(self) -> LanguageModel:
        """The model; raises as `load_hf`. What is compiled from here on is kept for the next time."""
        from zamba2_jax.checkpoint.hf import load_hf

        keep_compiled_programs()
        dtype = self.compute_dtype()
        return load_hf(self.directory, dtype=None if dtype == "stored" else dtype)

    def compute_dtype(self) -> Dtype:
        """What "auto" means on this machine."""
        import jax

        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "stored"


def keep_compiled_programs() -> None:
    """Has JAX keep compiled programs: where JAX_COMPILATION_CACHE_DIR says, or in the user's cache directory."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_caches() / "compiled"))
