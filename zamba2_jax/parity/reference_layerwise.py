"""The PyTorch side one layer at a time: the counterpart of `parity.layerwise`."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import transformers
from torch import nn

from zamba2_jax.models.tensors import Tensor
from zamba2_jax.nn.config import LayerPlan, ModelConfig
from zamba2_jax.parity.case import Batch
from zamba2_jax.parity.evidence import Items
from zamba2_jax.parity.families import reference_family
from zamba2_jax.parity.families.base import LayerCall
from zamba2_jax.parity.reference import numpy, reference_config, split, states

CHUNK_SIZE = 64
"""Of PyTorch's scan: what it is fastest with."""


def evidence(
    config: ModelConfig,
    ends: Callable[[], dict[Tensor, np.ndarray]],
    parts: Callable[[LayerPlan], dict[Tensor, np.ndarray]],
    batch: Batch,
    dtype: torch.dtype,
    *,
    gradients: bool,
) -> Iterator[Items]:
    """What `layerwise.evidence` gives without `sum_calls`, from the modules of transformers.

    Args:
        config: the architecture.
        ends: gives the tensors outside the layers.
        parts: gives the tensors of a layer, those of the shared block it calls among them; asked twice per layer.
        batch: the tokens, without padding.
        dtype: to compute in.
        gradients: whether to go backward at all.
    """
    family, hf = reference_family(config), reference_config(config, CHUNK_SIZE)
    hf._attn_implementation = "sdpa"
    tokens = torch.from_numpy(np.asarray(batch.tokens)).long()
    outer = {tensor.parts[0].path: torch.from_numpy(array).to(dtype) for tensor, array in ends().items()}
    embed, norm = outer["embed"], outer["norm"]
    matrix = outer.get("head", embed)

    def run(module: nn.Module, row: LayerPlan, h: torch.Tensor, e: torch.Tensor, cache: transformers.Cache | None):
        return family.run(LayerCall(hf, module, row, h, e, cache))

    h = embedded = embed[tokens]
    yield {"embed": numpy(h)}
    inputs = []
    for row in config.layer_plan:
        inputs.append(h)
        cache = transformers.DynamicCache(config=hf)
        with torch.no_grad():
            h = run(_module(config, hf, row, parts(row), dtype), row, h, embedded, cache)
        yield {f"layers.{row.layer}.output": numpy(h), **states(config, cache, row.layer, batch)}

    leaves = [tensor.detach().requires_grad_(gradients) for tensor in (h, norm, matrix)]
    logits, loss = _head(config, leaves[0], leaves[1], leaves[2], tokens)
    yield {"logits": numpy(logits)}
    yield {"loss": numpy(loss)}
    if not gradients:
        return
    loss.backward()
    cotangent, d_norm, d_matrix = (leaf.grad for leaf in leaves)
    yield {"gradient.norm": numpy(d_norm)}
    yield {"gradient.head": numpy(d_matrix)}
    del leaves, logits, loss, d_matrix  # the largest tensors

    d_embedded = torch.zeros_like(embedded)
    for row, h in zip(reversed(config.layer_plan), reversed(inputs), strict=True):
        tensors = parts(row)
        module = _module(config, hf, row, tensors, dtype)
        h, e = h.clone().requires_grad_(), embedded.clone().requires_grad_()
        run(module, row, h, e, None).backward(cotangent)
        cotangent = h.grad
        yield from _gradients(module, row, tensors)
        if row.hybrid is not None:
            d_embedded += e.grad
    d_embed = torch.zeros_like(embed).index_put_((tokens,), d_embedded + cotangent, accumulate=True)
    yield {"gradient.embed": numpy(d_embed)}


def _module(
    config: ModelConfig,
    hf: transformers.PretrainedConfig,
    row: LayerPlan,
    tensors: dict[Tensor, np.ndarray],
    dtype: torch.dtype,
) -> nn.Module:
    """One layer, plain or hybrid, on the given tensors."""
    family = reference_family(config)
    with torch.device("meta"):
        module = family.layer(hf, row)
    values = {_inner_name(tensor): torch.from_numpy(array).to(dtype) for tensor, array in tensors.items()}
    missing, unexpected = module.load_state_dict(values, strict=False, assign=True)
    unread = [name for name in missing if not family.unread(name)]
    if unread or unexpected:
        raise ValueError(f"layer {row.layer}: transformers misses {unread} and does not expect {unexpected}")
    return module.eval()


def _gradients(module: nn.Module, row: LayerPlan, tensors: dict[Tensor, np.ndarray]) -> Iterator[Items]:
    """Those of the Mamba2 layer, of the call, and of the call's share in the block, as `layerwise` groups them."""
    parameters = dict(module.named_parameters())
    groups: dict[str, dict[str, np.ndarray]] = {"layers": {}, "calls": {}, "shared": {}}
    for tensor in tensors:
        gradient = parameters[_inner_name(tensor)].grad
        assert gradient is not None
        for name, array in split(tensor, gradient).items():
            _, kind, _, rest = name.split(".", 3)
            if kind == "shared" and row.hybrid is not None:
                name = f"gradient.calls.{row.hybrid.call}.block.{rest}"
            groups[kind][name] = array
    yield from (group for group in groups.values() if group)


def _inner_name(tensor: Tensor) -> str:
    """The name within the layer: "mamba.A_log" for "model.layers.3.mamba.A_log"."""
    return tensor.name.split(".", 3)[3]


def _head(
    config: ModelConfig, h: torch.Tensor, norm: torch.Tensor, matrix: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    final = reference_family(config).norm(config.hidden_size, eps=config.rms_norm_eps)
    del final.weight
    final.weight = norm
    logits = nn.functional.linear(final(h).to(matrix.dtype), matrix)
    return logits, nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
