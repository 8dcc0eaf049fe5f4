"""Whole models: one training step over all devices of this process, and prefill with steps after it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from zamba2_jax.check.compare import (
    Finding,
    Measured,
    Subject,
    attempt,
    errors,
    findings,
    on_host,
    relative_error,
    seconds,
)
from zamba2_jax.data.batches import Batch
from zamba2_jax.inference.decode import decode_step, prefill
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.config import HybridConfig, ModelConfig
from zamba2_jax.ops.backend import XLA, Backend, default_backend
from zamba2_jax.parallel.mesh import batch_sharding, check_mesh, local_mesh, shard_model
from zamba2_jax.train.objectives import next_token_loss
from zamba2_jax.train.step import StepConfig, compile_train_step, init_state
from zamba2_jax.typing import Array

Dtype = Literal["float32", "bfloat16"]

LIMIT = 2.5
"""Of errors, over those of a single op: a model is a dozen of them deep."""
LENGTH, NEW = 96, 8
"""Tokens of a row, and how many of them a model takes in by steps."""
RATE = 1024.0
"""Of the one step of gradient descent: so large that rounding the parameters loses nothing of the gradient."""


def shallow(config: ModelConfig) -> ModelConfig:
    """The architecture cut to one layer, which calls a shared block if any layer does."""
    if isinstance(config, HybridConfig) and config.num_calls:
        return dataclasses.replace(config, num_layers=1, hybrid_layer_ids=(0,), num_shared_blocks=1)
    return config.with_num_layers(1)


def check_training_step(name: str, config: ModelConfig, dtype: Dtype, *, real: bool = False) -> list[Finding]:
    """A step of gradient descent on rows of two documents, one for each device, against the reference in float64.

    Parameters and rows are divided along `fsdp` over the devices of this process, or as many as divide the model.

    Args:
        name: of the model.
        config: its architecture.
        dtype: the compute dtype; parameters are float32.
        real: whether times count.
    """
    mesh = _widest_mesh(config)
    devices = mesh.size
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (devices, LENGTH)).astype(np.int32)
    ids = np.where(np.arange(LENGTH) < LENGTH // 3, 1, 2)[None].repeat(devices, 0).astype(np.int32)
    model = init_model(config, rngs=nnx.Rngs(0))
    exact = on_host(partial(_reference_gradient, tokens=tokens, ids=ids), model)
    options = {"xla": StepConfig(scan="xla", attention="xla", compute_dtype=dtype)}
    with jax.set_mesh(mesh):
        backend = default_backend(dtype)
    if (backend.scan, backend.attention) != (XLA.scan, XLA.attention):
        options["default"] = StepConfig(compute_dtype=dtype)
    measured: dict[str, Measured] = {}
    calls = {}
    with jax.set_mesh(mesh):
        batch = jax.device_put(Batch(tokens, ids), batch_sharding(mesh))
        for key, step in options.items():
            descent = _Descent(model, batch, mesh, step)
            measured[key] = attempt(partial(descent.errors, exact))
            if isinstance(measured[key], dict):
                calls[key] = descent
        times = seconds(calls)
    shape = f"{name}, 1 layer, {devices} x {LENGTH}" + (f", fsdp={devices}" if devices > 1 else "")
    return findings(Subject("training step", shape, dtype, real=real, limit=LIMIT), measured, times)


def _widest_mesh(config: ModelConfig) -> jax.sharding.Mesh:
    meshes = (local_mesh(fsdp=devices) for devices in range(jax.local_device_count(), 0, -1))
    return next(mesh for mesh in meshes if _divides(mesh, config))


def _divides(mesh: jax.sharding.Mesh, config: ModelConfig) -> bool:
    try:
        check_mesh(config, mesh)
    except ValueError:
        return False
    return True


class _Descent:
    """A compiled step of gradient descent and the state it goes on from; each call takes a step."""

    def __init__(self, model: LanguageModel, batch: Batch, mesh: jax.sharding.Mesh, config: StepConfig):
        self.model, self.batch, self.mesh, self.config = model, batch, mesh, config

    def errors(self, exact: Any) -> dict[str, float]:
        """Of the loss, and of the gradient, which is how far the parameters went over the rate."""
        model = shard_model(jax.tree.map(jnp.copy, self.model), self.mesh)
        state, optimizer = init_state(model, optax.identity()), optax.identity()

        def schedule(step: Any) -> Array:
            return jnp.where(step == 0, RATE, 0.0)

        self.step = compile_train_step(state, self.batch, optimizer=optimizer, schedule=schedule, config=self.config)
        self.state, metrics = self.step(state, self.batch)
        before, after = (jax.tree.leaves(jax.device_get(tree)) for tree in (self.model, self.state.model))
        gradient = [(np.float64(b) - np.float64(a)) / RATE for b, a in zip(before, after, strict=True)]
        loss, exact_gradient = exact
        return {
            "loss": relative_error([metrics.loss], [loss]),
            "gradient": relative_error(gradient, jax.tree.leaves(exact_gradient)),
        }

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


def _reference_gradient(model: LanguageModel, tokens: np.ndarray, ids: np.ndarray) -> tuple[Array, LanguageModel]:
    def loss(model: LanguageModel) -> Array:
        return next_token_loss(model, jnp.asarray(tokens), jnp.asarray(ids), backend=Backend.reference())[0]

    return jax.value_and_grad(loss)(model)


def check_generation(name: str, config: ModelConfig, dtype: Dtype, *, real: bool = False) -> list[Finding]:
    """Logits after a prompt of `LENGTH - NEW` tokens, and of `NEW` steps, against one full pass in float64.

    Arguments as of `check_training_step`, on the first device; times are those of a step.
    """
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH)), jnp.int32)
    with jax.set_mesh(local_mesh()):
        model = init_model(config, rngs=nnx.Rngs(0), dtype=dtype)
        exact = on_host(_reference_logits, model, tokens)
        backends = {"xla": XLA, "default": default_backend(dtype)}
        if backends["default"] == XLA:
            del backends["default"]
        measured: dict[str, Measured] = {}
        calls = {}
        for key, backend in backends.items():
            measured[key] = attempt(partial(_generation_errors, model, tokens, backend, exact))
            if isinstance(measured[key], dict):
                _, cache = prefill(model, tokens[:, :-NEW], capacity=LENGTH, backend=backend)
                calls[key] = partial(decode_step, model, tokens[:, -1], cache, backend=backend)
        times = seconds(calls)
    shape = f"{name}, 1 layer, 1 x {LENGTH - NEW} + {NEW}"
    return findings(Subject("prefill and steps", shape, dtype, real=real, limit=LIMIT), measured, times)


def _generation_errors(
    model: LanguageModel, tokens: Array, backend: Backend, exact: Mapping[str, Array]
) -> dict[str, float]:
    logits, cache = prefill(model, tokens[:, :-NEW], capacity=LENGTH, backend=backend)
    stepped = []
    for token in tokens[:, -NEW:].T:
        after, cache = decode_step(model, token, cache, backend=backend)
        stepped.append(np.asarray(after, np.float64))
    return errors({"prefill": logits, "steps": np.stack(stepped, 1)}, exact)


def _reference_logits(model: LanguageModel, tokens: Array) -> dict[str, Array]:
    logits = model(tokens, backend=Backend.reference())
    return {"prefill": logits[:, -NEW - 1], "steps": logits[:, -NEW:]}
