"""Where each parameter of Zamba2 lies in a checkpoint: the one table, for reading and for writing.

`in_proj` is z, x, (B, C) and dt, one below the other; `gate_up_proj` is gate and up; `q_proj` is what reads the
residual stream and what reads the embeddings, side by side.
"""

from collections.abc import Iterator

from zamba2_jax.models.mamba2.weights import mixer_tensors
from zamba2_jax.models.tensors import Part, Tensor
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.nn.config import HybridPlan


def tensors(config: Zamba2Config) -> list[Tensor]:
    """The table: every tensor of a checkpoint of this model, each parameter in exactly one of them."""
    v, d = config.vocab_size, config.hidden_size
    table = [_tensor("model.embed_tokens.weight", (), (v, d), ("embed", v))]
    if config.tie_embeddings:
        table[0] = table[0]._replace(copies=("lm_head.weight",))
    for row in config.layer_plan:
        table += _mamba_tensors(config, row.layer, row.hybrid)
        if row.hybrid is not None:
            table += _call_tensors(config, row.layer, row.hybrid)
    for block in range(config.num_shared_blocks):
        table += _block_tensors(config, block)
    table.append(_tensor("model.final_layernorm.weight", (), (d,), ("norm", d)))
    if not config.tie_embeddings:
        table.append(_tensor("lm_head.weight", (), (v, d), ("head", v)))
    return table


def ignored(config: Zamba2Config, name: str) -> bool:
    """Whether an extra tensor is one that checkpoints carry and no call reads.

    Those are buffers of the rotary embedding, and in the old layout the adapters a shared block holds for the calls
    of the other blocks.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return True
    path = name.split(".")
    if path[:2] != ["model", "blocks"] or len(path) < 6 or not path[4].endswith("_list"):
        return False
    block, slot = path[2], path[5]
    if not (block.isdigit() and slot.isdigit() and int(slot) < config.num_calls):
        return False
    return int(block) < config.num_shared_blocks and int(slot) % config.num_shared_blocks != int(block)


def _tensor(name: str, aliases: tuple[str, ...], shape: tuple[int, ...], *parts: tuple[str, int]) -> Tensor:
    return Tensor(name, aliases, shape, tuple(Part(*part) for part in parts))


def _mamba_tensors(config: Zamba2Config, layer: int, hybrid: HybridPlan | None) -> Iterator[Tensor]:
    d, ours = config.hidden_size, f"layers.{layer}."
    current = f"model.layers.{layer}." + ("" if hybrid is None else "mamba_decoder.")
    old = f"model.mamba_layers.{layer}."

    def names(name: str) -> tuple[str, ...]:
        """Of a tensor of the mixer; the in projection has had two names."""
        also = [name.replace("in_proj.", "in_proj.0.")] if name.startswith("in_proj.") else []
        return (f"{current}mamba.{name}", *(f"{old}mamba.{other}" for other in (name, *also)))

    yield _tensor(f"{current}input_layernorm.weight", (f"{old}input_layernorm.weight",), (d,), (f"{ours}norm", d))
    yield from mixer_tensors(config, f"{ours}mamba.", names)


def _call_tensors(config: Zamba2Config, layer: int, hybrid: HybridPlan) -> Iterator[Tensor]:
    """What one call owns. Its adapters lie with the shared block."""
    d, a, f = config.hidden_size, config.adapter_rank, config.ffn_size
    size, kv_size = config.attention_size, config.kv_size
    i, ours = hybrid.call, f"calls.{hybrid.call}."

    def pair(module: str, old_module: str, size: int, into: str, *out: tuple[str, int]) -> Iterator[Tensor]:
        """The two matrices of an adapter on inputs of width `size`."""
        shapes = ((a, size), (sum(rows for _, rows in out), a))
        for j, (side, shape, parts) in enumerate(zip("AB", shapes, ([(into, a)], out), strict=True)):
            name = f"{module}_adapter_list.{i}.{j}.weight"
            old_name = f"{old_module}_lora_{side}_list.{i}.weight"
            owned = [(ours + path, rows) for path, rows in parts] if a else []  # transformers has empty matrices
            yield _shared_tensor(config, hybrid.block, name, old_name, shape, *owned)

    if config.attention_adapters:
        for head, rows in (("q", size), ("k", kv_size), ("v", kv_size)):
            parts = (f"attention.{head}_a", (f"attention.{head}_b", rows))
            yield from pair(f"self_attn.linear_{head}", f"self_attn.linear_{head}", size, *parts)
    outputs = (("mlp.gate_b", f), ("mlp.up_b", f))
    yield from pair("feed_forward.gate_up_proj", "feed_forward.linear_fc1", d, "mlp.a", *outputs)
    yield _tensor(
        f"model.layers.{layer}.linear.weight",
        (f"model.linear_layers.{i}.weight",),
        (d, d),
        (ours + "linear", d),
    )


def _shared_tensor(
    config: Zamba2Config,
    block: int,
    name: str,
    old_name: str,
    shape: tuple[int, ...],
    *parts: tuple[str, int],
) -> Tensor:
    """A tensor that lies with a shared block: at the first layer that calls it, and perhaps at the later ones."""
    layers = config.hybrid_layer_ids[block :: config.num_shared_blocks]
    first, *later = (f"model.layers.{layer}.shared_transformer.{name}" for layer in layers)
    tensor = _tensor(first, (f"model.blocks.{block}.{old_name}",), shape, *parts)
    return tensor._replace(copies=tuple(later))


def _block_tensors(config: Zamba2Config, block: int) -> Iterator[Tensor]:
    d, f, size = config.hidden_size, config.ffn_size, config.attention_size
    kv_size, ours = config.kv_size, f"shared.{block}."

    def tensor(name: str, shape: tuple[int, ...], *parts: tuple[str, int], old_name: str | None = None) -> Tensor:
        owned = [(ours + path, rows) for path, rows in parts]
        return _shared_tensor(config, block, name, old_name or name, shape, *owned)

    yield tensor("input_layernorm.weight", (size,), ("norm", size))
    yield tensor("pre_ff_layernorm.weight", (d,), ("mlp_norm", d))
    for head, rows in (("q", size), ("k", kv_size), ("v", kv_size)):
        halves = ((f"attention.{head}_residual", d), (f"attention.{head}_embedded", d))
        yield tensor(f"self_attn.{head}_proj.weight", (rows, size), *halves)._replace(axis=1)
    yield tensor("self_attn.o_proj.weight", (d, size), ("attention.o", d))
    kinds = [("weight", ""), *([("bias", "_bias")] if config.add_bias_linear else [])]
    for kind, suffix in kinds:
        up_tail, down_tail = ((d,), (f,)) if kind == "weight" else ((), ())
        up_parts = ((f"mlp.gate{suffix}", f), (f"mlp.up{suffix}", f))
        up_name, down_name = f"feed_forward.linear_fc1.{kind}", f"feed_forward.linear_fc2.{kind}"
        yield tensor(f"feed_forward.gate_up_proj.{kind}", (2 * f, *up_tail), *up_parts, old_name=up_name)
        down = (f"mlp.down{suffix}", d)
        yield tensor(f"feed_forward.down_proj.{kind}", (d, *down_tail), down, old_name=down_name)
