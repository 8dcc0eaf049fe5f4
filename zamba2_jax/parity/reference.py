"""The PyTorch side: the models of `transformers`, each as `parity.families` makes it the same as ours."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from zamba2_jax.models.registry import config_json, family_of
from zamba2_jax.models.tensors import Tensor
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parity.case import Batch
from zamba2_jax.parity.evidence import Items
from zamba2_jax.parity.families import reference_family
from zamba2_jax.parity.states import ATTENTION

CHUNK_SIZE = 16
"""Of PyTorch's scan: a speed setting there too; small, so that short rows have several chunks."""

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def reference_config(config: ModelConfig, chunk_size: int) -> transformers.PretrainedConfig:
    """The config with which transformers computes the same model.

    Raises:
        ValueError: transformers has no such family, or cannot be held to what the architecture says.
    """
    family = reference_family(config)
    settings = family.settings(config, chunk_size)
    return family.model.config_class.from_dict(config_json(config) | settings)


def load(directory: Path, config: ModelConfig, dtype: str, chunk_size: int) -> transformers.PreTrainedModel:
    """Reads a checkpoint with transformers.

    Raises:
        ValueError: transformers found tensors missing or unexpected.
    """
    family = reference_family(config)
    model, report = family.model.from_pretrained(
        directory,
        config=reference_config(config, chunk_size),
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    wrong = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"transformers did not take {directory} as its own: {wrong}")
    if family.shared is not None:
        _share_blocks(_layers(model), config, family.shared)
    return model.eval()


def _share_blocks(layers: nn.ModuleList, config: ModelConfig, name: str) -> None:
    """Makes them one module; transformers does so only where it ties the head too."""
    first: dict[int, nn.Module] = {}
    for row in config.layer_plan:
        if row.hybrid is not None:
            block = first.setdefault(row.hybrid.block, getattr(layers[row.layer], name))
            setattr(layers[row.layer], name, block)


def _layers(model: transformers.PreTrainedModel) -> nn.ModuleList:
    return model.base_model.layers


def forward(model: transformers.PreTrainedModel, config: ModelConfig, batch: Batch) -> Items:
    """Embeddings, layer outputs, states after the last token, and logits, named as in `parity.ours`."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            outputs[name] = output

        return hook

    places = [("embed", model.get_input_embeddings())]
    places += [(f"layers.{i}.output", layer) for i, layer in enumerate(_layers(model))]
    hooks = [module.register_forward_hook(keep(name)) for name, module in places]
    with torch.no_grad():
        result = model(**_inputs(model, batch), use_cache=True)
    for hook in hooks:
        hook.remove()
    items = {name: _masked(output, batch) for name, output in outputs.items()}
    cache = result.cache_params if "cache_params" in result else result.past_key_values
    for i in range(config.num_layers):
        items |= states(config, cache, i, batch)
    return items | {"logits": _masked(result.logits, batch)}


def gradients(
    model: transformers.PreTrainedModel, config: ModelConfig, batch: Batch, *, backward: bool = True
) -> Iterator[Items]:
    """The loss and, with `backward`, its gradient in every parameter, by their paths in our model."""
    inputs = _inputs(model, batch)
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


def greedy(model: transformers.PreTrainedModel, batch: Batch, new_tokens: int) -> np.ndarray:
    """The likeliest continuation of every row, [b, new_tokens], decoded with its cache."""
    inputs = _tokens(batch)
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


def _tokens(batch: Batch) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.from_numpy(np.asarray(batch.tokens)).long()}
    inputs["attention_mask"] = torch.from_numpy(batch.real).long()
    return inputs


def _inputs(model: transformers.PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Also positions, which a full pass would count through the padding; a model without attention has none."""
    inputs = _tokens(batch)
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def _masked(values: torch.Tensor, batch: Batch) -> np.ndarray:
    """Values [b, t, ...], 0 at padding, where neither side means anything."""
    return np.where(batch.real[..., None], numpy(values), 0)


def states(config: ModelConfig, cache: transformers.Cache, layer: int, batch: Batch) -> Items:
    """The states of one layer in a cache, 0 at padding."""
    items = {}
    for name, state in reference_family(config).cached(config, cache, layer).items():
        array = numpy(state)
        if name in ATTENTION.names:
            array = array * batch.real[:, None, batch.real.shape[1] - array.shape[2] :, None]
        items[f"layers.{layer}.{name}"] = array
    return items
