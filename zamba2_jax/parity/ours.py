"""Our side, through the public functions: what a user runs is what is compared."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zamba2_jax.inference.api import generate
from zamba2_jax.interpret.taps import Captured, capture
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import family_of, init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.parity.case import Batch, random_tensor
from zamba2_jax.parity.evidence import Items
from zamba2_jax.parity.states import States
from zamba2_jax.train.objectives import next_token_loss
from zamba2_jax.typing import DTypeLike, param_dtype


def random_model(config: ModelConfig, seed: int, dtype: DTypeLike = jnp.float32) -> LanguageModel:
    """A model of the weights of `case.random_tensor`, in compute dtype `dtype`."""
    values = {
        path: jnp.asarray(array, param_dtype(array.ndim, dtype))
        for tensor in family_of(config).tensors(config)
        for path, array in tensor.split(random_tensor(tensor, seed)).items()
    }
    return with_values(jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0))), values)


def forward(model: LanguageModel, states: States, batch: Batch) -> Items:
    """Embeddings, layer outputs, states after the last token, and logits."""
    layers = [f"layers.{i}" for i in range(model.config.num_layers)]
    seen = ("embed", *(f"{layer}.output" for layer in layers))
    select = (*seen, *(f"{layer}.{tap}" for layer in layers for tap in states.taps))

    @jax.jit
    def run(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None) -> Captured:
        return capture(model, tokens, select=select, segment_ids=segment_ids)

    logits, captured, _ = run(model, batch.tokens, batch.segment_ids)
    real = batch.real[..., None]
    items = {name: np.asarray(captured[name], np.float32) * real for name in seen}
    for layer in layers:
        values = {tap: np.asarray(captured[f"{layer}.{tap}"], np.float32) for tap in states.taps}
        named = states.from_taps(model.config, values, batch.real)
        items |= {f"{layer}.{name}": state for name, state in named.items()}
    return items | {"logits": np.asarray(logits, np.float32) * real}


def gradients(model: LanguageModel, batch: Batch, *, backward: bool = True) -> Iterator[Items]:
    """The loss and, with `backward`, its gradient in every parameter."""
    if batch.tokens.shape[1] == 1:
        return

    def loss_of(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        return next_token_loss(model, tokens, segment_ids)[0]

    if not backward:
        yield {"loss": np.asarray(jax.jit(loss_of)(model, batch.tokens, batch.segment_ids))}
        return
    run = jax.jit(jax.value_and_grad(loss_of))
    loss, gradient = run(model, batch.tokens, batch.segment_ids)
    yield {"loss": np.asarray(loss)}
    for name, parameter in named_parameters(gradient).items():
        yield {f"gradient.{name}": np.asarray(parameter[...])}


def greedy(model: LanguageModel, batch: Batch, new_tokens: int) -> np.ndarray:
    """The likeliest continuation of every row, [b, new_tokens], decoded with its cache."""
    tokens = jnp.asarray(batch.tokens)
    prompts = [np.asarray(row)[real].tolist() for row, real in zip(tokens, batch.real, strict=True)]
    return np.array(generate(model, prompts, new_tokens))
