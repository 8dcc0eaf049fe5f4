"""Where each parameter of a dense transformer lies in a checkpoint: the one table, for reading and for writing."""

from collections.abc import Iterator

from zamba2_jax.models.tensors import Part, Tensor
from zamba2_jax.models.transformer.config import TransformerConfig


def tensors(config: TransformerConfig) -> list[Tensor]:
    """The table: every tensor of a checkpoint of this model, each of them one parameter."""
    v, d = config.vocab_size, config.hidden_size
    table = [_tensor("model.embed_tokens.weight", "embed", (v, d))]
    if config.tie_embeddings:
        table[0] = table[0]._replace(copies=("lm_head.weight",))
    for layer in range(config.num_layers):
        table += _layer_tensors(config, layer)
    table.append(_tensor("model.norm.weight", "norm", (d,)))
    if not config.tie_embeddings:
        table.append(_tensor("lm_head.weight", "head", (v, d)))
    return table


def ignored(config: TransformerConfig, name: str) -> bool:
    """Whether an extra tensor is one that checkpoints carry and nothing reads: buffers of the rotary embedding."""
    return name.endswith("rotary_emb.inv_freq")


def _layer_tensors(config: TransformerConfig, layer: int) -> Iterator[Tensor]:
    d, f, size, kv_size = config.hidden_size, config.ffn_size, config.attention_size, config.kv_size
    theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
    yield _tensor(theirs + "input_layernorm.weight", ours + "norm", (d,))
    yield _tensor(theirs + "post_attention_layernorm.weight", ours + "mlp_norm", (d,))
    attention = {"q": (size, d), "k": (kv_size, d), "v": (kv_size, d), "o": (d, size)}
    mlp = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    blocks = (("self_attn", "attention", attention, config.attention_bias), ("mlp", "mlp", mlp, config.mlp_bias))
    for block, our_block, matrices, biases in blocks:
        for name, shape in matrices.items():
            yield _tensor(f"{theirs}{block}.{name}_proj.weight", f"{ours}{our_block}.{name}", shape)
            if biases:
                yield _tensor(f"{theirs}{block}.{name}_proj.bias", f"{ours}{our_block}.{name}_bias", shape[:1])


def _tensor(name: str, path: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, (), shape, (Part(path, shape[0]),))
