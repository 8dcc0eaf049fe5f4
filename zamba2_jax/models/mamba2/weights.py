"""Where each parameter of Mamba2 lies in a checkpoint: the one table, for reading and for writing.

`in_proj` is z, x, (B, C) and dt, one below the other; `conv1d` is x and (B, C).
"""

from collections.abc import Callable, Iterator

from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.models.tensors import Form, Part, Tensor
from zamba2_jax.nn.config import Mamba2Config


def tensors(config: Mamba2LMConfig) -> list[Tensor]:
    """The table: every tensor of a checkpoint of this model, each parameter in exactly one of them."""
    v, d = config.vocab_size, config.hidden_size
    copies = ("lm_head.weight",) if config.tie_embeddings else ()
    aliases = ("backbone.embedding.weight",)  # as mamba_ssm has it
    table = [Tensor("backbone.embeddings.weight", aliases, (v, d), (Part("embed", v),), copies=copies)]
    for layer in range(config.num_layers):
        table += _layer_tensors(config, f"layers.{layer}.", f"backbone.layers.{layer}.")
    table.append(Tensor("backbone.norm_f.weight", (), (d,), (Part("norm", d),)))
    if not config.tie_embeddings:
        table.append(Tensor("lm_head.weight", (), (v, d), (Part("head", v),)))
    return table


def ignored(config: Mamba2LMConfig, name: str) -> bool:
    """Whether an extra tensor is one that checkpoints carry and no call reads: there are none."""
    return False


def _layer_tensors(config: Mamba2LMConfig, ours: str, theirs: str) -> Iterator[Tensor]:
    d = config.hidden_size
    yield Tensor(f"{theirs}norm.weight", (), (d,), (Part(f"{ours}norm", d),))
    yield from mixer_tensors(config, f"{ours}mamba.", lambda name: (f"{theirs}mixer.{name}",))


def mixer_tensors(config: Mamba2Config, ours: str, names: Callable[[str], tuple[str, ...]]) -> Iterator[Tensor]:
    """The rows of the table for one Mamba2 block, as `in_proj.weight`.

    Args:
        config: the architecture.
        ours: what stands before our names.
        names: of a tensor in the current layout and then in older ones, from its own.
    """
    d, e, bc, h = config.hidden_size, config.inner_size, config.bc_size, config.mamba_heads

    def tensor(name: str, tail: tuple[int, ...], *parts: tuple[str, int], form: Form = Form.SAME) -> Tensor:
        current, *aliases = names(name)
        shape = (sum(rows for _, rows in parts), *tail)
        return Tensor(current, tuple(aliases), shape, tuple(Part(ours + path, rows) for path, rows in parts), form=form)

    in_parts = [("in_z", e), ("in_x", e), ("in_bc", bc), ("in_dt", h)]
    yield tensor("in_proj.weight", (d,), *in_parts)
    if config.add_bias_linear:
        yield tensor("in_proj.bias", (), *((f"{part}_bias", rows) for part, rows in in_parts))
        yield tensor("out_proj.bias", (), ("out_bias", d))
    yield tensor("conv1d.weight", (1, config.d_conv), ("conv_x", e), ("conv_bc", bc), form=Form.CONV)
    if config.use_conv_bias:
        yield tensor("conv1d.bias", (), ("conv_x_bias", e), ("conv_bc_bias", bc))
    for vector in ("A_log", "D", "dt_bias"):
        yield tensor(vector, (), (vector, h))
    yield tensor("norm.weight", (), ("norm", e))
    yield tensor("out_proj.weight", (e,), ("out", d))
