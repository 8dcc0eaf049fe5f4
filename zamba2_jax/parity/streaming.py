"""Parity of a model that does not fit: layer after layer through both frameworks and the oracle, side by side."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors import safe_open

from zamba2_jax.checkpoint.hf import find_entries, match
from zamba2_jax.models.registry import family_of
from zamba2_jax.models.tensors import Tensor
from zamba2_jax.nn.config import LayerPlan, ModelConfig
from zamba2_jax.nn.parameter import with_values
from zamba2_jax.ops.backend import Backend, default_backend
from zamba2_jax.parity import layerwise, reference_layerwise
from zamba2_jax.parity.case import Case, random_tensor
from zamba2_jax.parity.check import Report, compare_items, compare_tokens, limits_for, report
from zamba2_jax.parity.evidence import Items, Row
from zamba2_jax.parity.families import reference_family

Read = Callable[[Tensor], np.ndarray]
"""Gives the values of a tensor, float32."""

ORACLE = layerwise.Precision("float64", dataclasses.replace(Backend.reference(), scan="xla"))
"""As `layerwise.ORACLE`, but for the scan: by chunks it is the recurrence to 1e-13, in half its time."""


def check_streaming(
    case: Case,
    directory: Path | None = None,
    *,
    dtype: str = "float32",
    precision: str = "highest",
    gradients: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs a model in both frameworks and in float64, holding one layer at a time.

    The gradient of a shared block is compared call by call, that of tied embeddings for the input and the output apart.
    In place of a greedy continuation, which would stream the model anew for every token, the likeliest next token is
    compared after every token of the batch.

    Args:
        case: the architecture and the shape of the batch, without padding.
        directory: a checkpoint of that architecture; random weights by default, made anew for every layer.
        dtype: compute dtype of both sides, "float32" or "bfloat16".
        precision: of our float32 matrix products, as for `jax.default_matmul_precision`; see `ops.linear`.
        gradients: whether to compare them; they take two thirds of the time.
        seed: of weights and tokens.
        progress: is told what is being compared.

    Raises:
        ValueError: the case has padding, the checkpoint is not one of the architecture, or transformers has no such
            family or cannot run it.
    """
    if case.left_padding:
        raise ValueError(f"left_padding={case.left_padding}: expected none when streaming")
    states = reference_family(case.config).states
    reference_layerwise.reference_config(case.config, reference_layerwise.CHUNK_SIZE)
    weights = _Weights(case.config, _reader(case.config, directory, seed, dtype))
    batch, ends = case.tokens(seed), weights.ends()

    def side(precision: layerwise.Precision) -> Iterator[Items]:
        items = layerwise.evidence(
            case.config, ends, weights.parts, batch, states, precision, gradients=gradients, sum_calls=False
        )
        return layerwise.with_settings(items, precision)

    our, oracle = side(layerwise.Precision(dtype, default_backend(dtype), precision)), side(ORACLE)
    their = reference_layerwise.evidence(
        case.config, weights.outer, weights.layer, batch, getattr(torch, dtype), gradients=gradients
    )
    rows: list[Row] = []
    for c, a, b in zip(oracle, our, their, strict=True):  # the oracle first: it needs the most memory for a step
        progress(f"both sides and float64 oracle: {next(iter(c))}")
        rows += compare_items(a, b, c)
        if "logits" in c:
            rows.append(compare_tokens(a["logits"].argmax(-1), b["logits"].argmax(-1)))
        del a, b, c
    return report(case.name, rows, limits_for(dtype, full=case.config.hidden_size >= 1024))


class _Weights:
    """The tensors of a model, read when they are needed; those of the last layer are kept."""

    def __init__(self, config: ModelConfig, read: Read):
        self._config, self._read = config, read
        self._table: dict[str, list[Tensor]] = {}
        for tensor in family_of(config).tensors(config):
            owner = ".".join(tensor.parts[0].path.split(".")[:2])
            self._table.setdefault(owner if "." in owner else "", []).append(tensor)
        self.layer = lru_cache(maxsize=1)(self._layer)
        self.parts = lru_cache(maxsize=1)(self._parts)

    def outer(self) -> dict[Tensor, np.ndarray]:
        """The tensors outside the layers."""
        return self._read_all("")

    def ends(self) -> layerwise.Ends:
        """The same as `layerwise` takes them."""
        values = _split(self.outer())
        return layerwise.Ends(values["embed"], values["norm"], values.get("head"))

    def _layer(self, row: LayerPlan) -> dict[Tensor, np.ndarray]:
        """All tensors of a layer."""
        values = self._read_all(f"layers.{row.layer}")
        if row.hybrid is not None:
            values |= self._read_all(f"calls.{row.hybrid.call}") | self._read_all(f"shared.{row.hybrid.block}")
        return values

    def _parts(self, row: LayerPlan) -> layerwise.Parts:
        """The same as modules."""
        tensors, model = self.layer(row), family_of(self._config).model()
        layer = self._module(partial(model.make_layer, layer=row.layer), tensors, f"layers.{row.layer}.")
        if row.hybrid is None:
            return layerwise.Parts(self._config, {0: layer}, {}, {})
        block = self._module(model.block, tensors, f"shared.{row.hybrid.block}.")
        call = self._module(model.call, tensors, f"calls.{row.hybrid.call}.")
        return layerwise.Parts(self._config, {0: layer}, {0: block}, {0: call})

    def _module(self, kind: Callable[..., nnx.Module], tensors: dict[Tensor, np.ndarray], prefix: str) -> nnx.Module:
        """The module whose paths start with `prefix`, on its share of the tensors."""
        own = _split({tensor: array for tensor, array in tensors.items() if tensor.parts[0].path.startswith(prefix)})
        values = {path.removeprefix(prefix): array for path, array in own.items()}
        return with_values(jax.eval_shape(lambda: kind(self._config, rngs=nnx.Rngs(0), dtype=jnp.float32)), values)

    def _read_all(self, owner: str) -> dict[Tensor, np.ndarray]:
        return {tensor: self._read(tensor) for tensor in self._table[owner]}


def _split(values: dict[Tensor, np.ndarray]) -> dict[str, jax.Array]:
    return {path: jnp.asarray(part) for tensor, array in values.items() for path, part in tensor.split(array).items()}


def _reader(config: ModelConfig, directory: Path | None, seed: int, dtype: str) -> Read:
    """Reads tensors of a checkpoint, or makes them at random; rounded to bfloat16 if that is what is computed in."""
    entries = {}
    if directory is not None:
        found, problems = match(config, find_entries(directory))
        if problems:
            raise ValueError(f"{directory} is not a checkpoint of {config}:\n  " + "\n  ".join(problems))
        entries = {tensor.name: entry for tensor, entry in found}

    def read(tensor: Tensor) -> np.ndarray:
        if directory is None:
            values = random_tensor(tensor, seed)
        else:
            with safe_open(entries[tensor.name].file, framework="numpy") as file:
                values = file.get_tensor(entries[tensor.name].name)
        if dtype == "bfloat16":
            values = values.astype(jnp.bfloat16)
        return values.astype(np.float32, copy=False)

    return read
