"""Where each parameter of Zamba1 lies in a checkpoint: the one table, for reading and for writing.

Rows of `in_proj` are x and z in turns; what is per head has an axis for the heads in front; `q_proj` is what reads the
residual stream and what reads the embeddings, side by side.
"""

from collections.abc import Iterator

from zamba2_jax.models.tensors import Form, Part, Tensor
from zamba2_jax.models.zamba1.config import Zamba1Config


def tensors(config: Zamba1Config) -> list[Tensor]:
    """The table: every tensor of a checkpoint of this model, each parameter in exactly one of them."""
    v, d = config.vocab_size, config.hidden_size
    copies = ("lm_head.weight",) if config.tie_embeddings else ()
    table = [_tensor("model.embed_tokens.weight", (v, d), "embed")._replace(copies=copies)]
    for row in config.layer_plan:
        theirs = f"model.layers.{row.layer}."
        table += _layer_tensors(
            config, f"layers.{row.layer}.", theirs if row.hybrid is None else f"{theirs}mamba_decoder."
        )
        if row.hybrid is not None:
            table.append(_tensor(f"{theirs}linear.weight", (d, d), f"calls.{row.hybrid.call}.linear"))
    for block in range(config.num_shared_blocks):
        table += _block_tensors(config, block)
    table.append(_tensor("model.final_layernorm.weight", (d,), "norm"))
    if not config.tie_embeddings:
        table.append(_tensor("lm_head.weight", (v, d), "head"))
    return table


def ignored(config: Zamba1Config, name: str) -> bool:
    """Whether an extra tensor is one that checkpoints carry and no call reads: buffers of a rotary embedding."""
    return name.endswith("rotary_emb.inv_freq")


def _tensor(name: str, shape: tuple[int, ...], path: str, form: Form = Form.SAME) -> Tensor:
    return Tensor(name, (), shape, (Part(path, shape[0]),), form=form)


def _layer_tensors(config: Zamba1Config, ours: str, theirs: str) -> Iterator[Tensor]:
    d, e, h, p = config.hidden_size, config.inner_size, config.mamba_heads, config.mamba_head_dim
    n, rank, theirs_mamba, ours_mamba = config.d_state, config.time_step_rank, f"{theirs}mamba.", f"{ours}mamba."

    def tensor(name: str, shape: tuple[int, ...], path: str, form: Form = Form.SAME) -> Tensor:
        return _tensor(theirs_mamba + name, shape, ours_mamba + path, form)

    def of_x_and_z(name: str, tail: tuple[int, ...], suffix: str) -> Tensor:
        parts = tuple(Part(f"{ours_mamba}{path}{suffix}", e) for path in ("in_x", "in_z"))
        return Tensor(f"{theirs_mamba}{name}", (), (2 * e, *tail), parts, alternate=True)

    yield _tensor(f"{theirs}input_layernorm.weight", (d,), f"{ours}norm")
    yield of_x_and_z("in_proj.weight", (d,), "")
    yield tensor("conv1d.weight", (e, 1, config.d_conv), "conv_x", Form.CONV)
    if config.use_conv_bias:
        yield tensor("conv1d.bias", (e,), "conv_x_bias")
    yield tensor("x_proj_weight", (h, config.x_proj_size, p), "x_proj", Form.HEAD_COLUMNS)
    yield tensor("dt_proj_weight", (h, p, rank), "dt_proj", Form.HEAD_ROWS)
    yield tensor("dt_proj_bias", (h, p), "dt_bias", Form.HEAD_ROWS)
    yield tensor("A_log", (h, p, n), "A_log", Form.VECTOR)
    yield tensor("D", (h, p), "D", Form.HEAD_ROWS)
    yield tensor("out_proj.weight", (d, e), "out")
    if config.use_proj_bias:
        yield of_x_and_z("in_proj.bias", (), "_bias")
        yield tensor("out_proj.bias", (d,), "out_bias")


def _block_tensors(config: Zamba1Config, block: int) -> Iterator[Tensor]:
    """Of a shared block: at the first layer that calls it, and perhaps at the later ones."""
    d, f, size, kv_size = config.hidden_size, config.ffn_size, config.attention_size, config.kv_size
    layers, ours = config.hybrid_layer_ids[block :: config.num_shared_blocks], f"shared.{block}."

    def tensor(name: str, shape: tuple[int, ...], *parts: tuple[str, int], axis: int = 0) -> Tensor:
        first, *later = (f"model.layers.{layer}.shared_transf.{name}.weight" for layer in layers)
        of_ours = tuple(Part(ours + path, part) for path, part in parts)
        return Tensor(first, (), shape, of_ours, axis=axis, copies=tuple(later))

    yield tensor("input_layernorm", (size,), ("norm", size))
    yield tensor("pre_ff_layernorm", (d,), ("mlp_norm", d))
    for head, rows in (("q", size), ("k", kv_size), ("v", kv_size)):
        halves = ((f"attention.{head}_residual", d), (f"attention.{head}_embedded", d))
        yield tensor(f"self_attn.{head}_proj", (rows, size), *halves, axis=1)
    yield tensor("self_attn.o_proj", (d, size), ("attention.o", d))
    yield tensor("feed_forward.gate_proj", (f, d), ("mlp.gate", f))
    yield tensor("feed_forward.up_proj", (f, d), ("mlp.up", f))
    yield tensor("feed_forward.down_proj", (d, f), ("mlp.down", d))
