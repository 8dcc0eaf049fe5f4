"""The PyTorch side: Zamba2 of `transformers`, with every trap that would make it another model taken out."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from zamba2_jax.models.registry import config_json, family_of
from zamba2_jax.models.tensors import Tensor
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.parity.case import Batch
from zamba2_jax.parity.evidence import Items

CHUNK_SIZE = 16
"""Of PyTorch's scan: a speed setting there too; small, so that short rows have several chunks."""

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def reference_config(config: Zamba2Config, chunk_size: int) -> transformers.Zamba2Config:
    """The config with which transformers computes the same model.

    transformers 5 clamps dt to `time_step_min` in a full pass. The released models were trained without a clamp, so
    it is set to next to nothing.

    Raises:
        ValueError: `time_step_limit` bounds dt, which transformers would do in a full pass only.
    """
    if config.time_step_limit != (0.0, float("inf")):
        raise ValueError(f"time_step_limit={config.time_step_limit}: transformers can only be held to (0, inf)")
    return transformers.Zamba2Config.from_dict(config_json(config) | {"time_step_min": 1e-30, "chunk_size": chunk_size})


def load(directory: Path, config: Zamba2Config, dtype: str, chunk_size: int) -> transformers.Zamba2ForCausalLM:
    """Reads a checkpoint with transformers.

    Raises:
        ValueError: transformers found tensors missing or unexpected.
    """
    model, report = transformers.Zamba2ForCausalLM.from_pretrained(
        directory,
        config=reference_config(config, chunk_size),
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    wrong = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"transformers did not take {directory} as its own: {wrong}")
    # transformers shares blocks only where it ties the head too: make them one module in any case.
    for row in config.layer_plan:
        if row.hybrid is not None:
            first = config.hybrid_layer_ids[row.hybrid.block]
            model.model.layers[row.layer].shared_transformer = model.model.layers[first].shared_transformer
    return model.eval()


def forward(model: transformers.Zamba2ForCausalLM, batch: Batch) -> Items:
    """Embeddings, layer outputs, states after the last token, and logits, named as in `parity.ours`."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            outputs[name] = output

        return hook

    places = [("embed", model.model.embed_tokens)]
    places += [(f"layers.{i}.output", layer) for i, layer in enumerate(model.model.layers)]
    hooks = [module.register_forward_hook(keep(name)) for name, module in places]
    with torch.no_grad():
        result = model(**_inputs(batch), use_cache=True)
    for hook in hooks:
        hook.remove()
    items = {name: _masked(output, batch) for name, output in outputs.items()}
    for i in range(len(model.model.layers)):
        items |= states(model.config, result.past_key_values, i)
    return items | {"logits": _masked(result.logits, batch)}


def gradients(
    model: transformers.Zamba2ForCausalLM, config: Zamba2Config, batch: Batch, *, backward: bool = True
) -> Iterator[Items]:
    """The loss and, with `backward`, its gradient in every parameter, by their paths in our model."""
    inputs = _inputs(batch)
    labels = inputs["input_ids"].long().masked_fill(~torch.from_numpy(batch.real), -100)
    if batch.segment_ids is not None:
        first_real = torch.from_numpy(batch.real.argmax(axis=1))
        labels[torch.arange(len(labels)), first_real] = -100  # else padding would have to predict it
    if batch.tokens.shape[1] == 1:
        return
    with torch.set_grad_enabled(backward):
        loss = model(**inputs, labels=labels, use_cache=False).loss
    yield {"loss": numpy(loss)}
    if not backward:
        return
    loss.backward()
    parameters = dict(model.named_parameters())
    for tensor in family_of(config).tensors(config):
        gradient = parameters[tensor.name].grad
        assert gradient is not None
        yield split(tensor, gradient)
        parameters[tensor.name].grad = None


def greedy(model: transformers.Zamba2ForCausalLM, batch: Batch, new_tokens: int) -> np.ndarray:
    """The likeliest continuation of every row, [b, new_tokens], decoded with its cache."""
    inputs = _inputs(batch)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    return tokens[:, inputs["input_ids"].shape[1] :].numpy()


def split(tensor: Tensor, gradient: torch.Tensor) -> Items:
    """The gradient of a Hugging Face tensor as those of our parameters, by name."""
    return {f"gradient.{path}": part for path, part in tensor.split(numpy(gradient)).items()}


def numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16 as float32, which holds it exactly."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.from_numpy(np.asarray(batch.tokens)).long()}
    inputs["attention_mask"] = torch.from_numpy(batch.real).long()
    return inputs


def _masked(values: torch.Tensor, batch: Batch) -> np.ndarray:
    """Values [b, t, ...], 0 at padding, where neither side means anything."""
    return numpy(values) * batch.real[..., None]


def states(config: transformers.Zamba2Config, cache: transformers.Cache, layer: int) -> Items:
    """The states of one layer's Mamba2 block in a cache."""
    taps = config.mamba_d_conv - 1
    return {
        f"layers.{layer}.conv_state": numpy(cache.get_conv_state(layer, state_idx=0)[..., -taps:]),
        f"layers.{layer}.ssm_state": numpy(cache.get_recurrent_state(layer, state_idx=0)),
    }
