"""The table of tensors, against the model's own parameters and against names written by hand."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from tests.checkpoint.variants import VARIANTS
from tests.helpers import abstract_model
from zamba2_jax import preset
from zamba2_jax.models.tensors import Form
from zamba2_jax.models.zamba2.weights import ignored, tensors
from zamba2_jax.nn.parameter import named_parameters

SEVEN_B = preset("zamba2-7b")
MODELS = VARIANTS | {"7b": SEVEN_B}
SHALLOW = dataclasses.replace(SEVEN_B, num_layers=12, hybrid_layer_ids=(6, 11))

# name: (older names, shape, parameters). Layers 6, 11, 17, ..., 77 of the 7B model call blocks 0, 1, 0, ..., 0.
BY_HAND = {
    "model.embed_tokens.weight": ([], (32000, 3584), ["embed"]),
    "model.final_layernorm.weight": ([], (3584,), ["norm"]),
    "model.layers.0.mamba.in_proj.weight": (
        ["model.mamba_layers.0.mamba.in_proj.weight", "model.mamba_layers.0.mamba.in_proj.0.weight"],
        (2 * 7168 + 2 * 2 * 64 + 112, 3584),
        ["layers.0.mamba.in_z", "layers.0.mamba.in_x", "layers.0.mamba.in_bc", "layers.0.mamba.in_dt"],
    ),
    "model.layers.11.mamba_decoder.mamba.conv1d.weight": (
        ["model.mamba_layers.11.mamba.conv1d.weight"],
        (7168 + 256, 1, 4),
        ["layers.11.mamba.conv_x", "layers.11.mamba.conv_bc"],
    ),
    "model.layers.11.mamba_decoder.input_layernorm.weight": (
        ["model.mamba_layers.11.input_layernorm.weight"],
        (3584,),
        ["layers.11.norm"],
    ),
    "model.layers.80.mamba.A_log": (["model.mamba_layers.80.mamba.A_log"], (112,), ["layers.80.mamba.A_log"]),
    "model.layers.80.mamba.norm.weight": (
        ["model.mamba_layers.80.mamba.norm.weight"],
        (7168,),
        ["layers.80.mamba.norm"],
    ),
    "model.layers.77.linear.weight": (["model.linear_layers.12.weight"], (3584, 3584), ["calls.12.linear"]),
    "model.layers.11.shared_transformer.self_attn.k_proj.weight": (
        ["model.blocks.1.self_attn.k_proj.weight"],
        (7168, 7168),
        ["shared.1.attention.k_residual", "shared.1.attention.k_embedded"],
    ),
    "model.layers.6.shared_transformer.self_attn.o_proj.weight": (
        ["model.blocks.0.self_attn.o_proj.weight"],
        (3584, 7168),
        ["shared.0.attention.o"],
    ),
    "model.layers.11.shared_transformer.feed_forward.gate_up_proj.weight": (
        ["model.blocks.1.feed_forward.linear_fc1.weight"],
        (2 * 14336, 3584),
        ["shared.1.mlp.gate", "shared.1.mlp.up"],
    ),
    "model.layers.11.shared_transformer.feed_forward.down_proj.weight": (
        ["model.blocks.1.feed_forward.linear_fc2.weight"],
        (3584, 14336),
        ["shared.1.mlp.down"],
    ),
    "model.layers.6.shared_transformer.feed_forward.gate_up_proj_adapter_list.12.0.weight": (
        ["model.blocks.0.feed_forward.linear_fc1_lora_A_list.12.weight"],
        (128, 3584),
        ["calls.12.mlp.a"],
    ),
    "model.layers.11.shared_transformer.feed_forward.gate_up_proj_adapter_list.3.1.weight": (
        ["model.blocks.1.feed_forward.linear_fc1_lora_B_list.3.weight"],
        (2 * 14336, 128),
        ["calls.3.mlp.gate_b", "calls.3.mlp.up_b"],
    ),
}


@pytest.mark.parametrize("config", [*VARIANTS.values(), SHALLOW], ids=[*VARIANTS, "7b of 12 layers"])
def test_the_parts_of_the_table_are_the_parameters_of_the_model(config):
    parameters, table = named_parameters(abstract_model(config)), tensors(config)
    assert Counter(part.path for tensor in table for part in tensor.parts) == Counter(parameters.keys())
    shapes: dict[tuple, list[tuple[int, ...]]] = {}
    for tensor in table:
        sizes = tuple(part.size for part in tensor.parts)
        kind = tensor.shape, sizes, tensor.axis, tensor.form
        if kind not in shapes:  # gigabytes each in 7B, where every layer's are split and joined in the same way
            assert sum(sizes) == tensor.shape[tensor.axis], tensor.name
            array = np.arange(np.prod(tensor.shape), dtype=np.int32).reshape(tensor.shape)
            parts = list(tensor.split(array).values())
            np.testing.assert_array_equal(tensor.join(parts), array)
            shapes[kind] = [part.shape for part in parts]
        assert [parameters[part.path].shape for part in tensor.parts] == shapes[kind], tensor.name


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_name_means_one_tensor(config):
    names = Counter(name for tensor in tensors(config) for name in (tensor.name, *tensor.aliases, *tensor.copies))
    assert names.most_common(1)[0][1] == 1
    assert not any(ignored(config, name) for name in names)


def test_names_and_shapes_of_the_7b_model():
    table = {tensor.name: tensor for tensor in tensors(SEVEN_B)}
    for name, (aliases, shape, paths) in BY_HAND.items():
        tensor = table[name]
        assert (list(tensor.aliases), tensor.shape, [part.path for part in tensor.parts]) == (aliases, shape, paths)
    per_layer, per_call, per_block = 9, 3, 8
    assert len(table) == 81 * per_layer + 13 * per_call + 2 * per_block + 2


def test_copies_lie_at_the_later_calls_of_the_same_block():
    table = {tensor.name: tensor.copies for tensor in tensors(SEVEN_B)}
    later = [f"model.layers.{layer}.shared_transformer.input_layernorm.weight" for layer in (17, 29, 41, 53, 65, 77)]
    assert table["model.layers.6.shared_transformer.input_layernorm.weight"] == tuple(later)
    assert table["model.embed_tokens.weight"] == ("lm_head.weight",)
    assert table["model.layers.0.mamba.D"] == ()


def test_only_what_no_call_reads_is_ignored():
    slot = "model.blocks.{}.feed_forward.linear_fc1_lora_A_list.{}.weight"
    unread = [
        slot.format(0, 1),
        slot.format(1, 0),
        slot.format(1, 12),
        "model.blocks.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
    ]
    read_or_unknown = [
        slot.format(0, 0),
        slot.format(1, 11),
        slot.format(0, 13),
        slot.format(2, 1),
        slot.format("x", 1),
        "model.blocks.0.feed_forward.linear_fc3.weight",
        "model.layers.6.shared_transformer.feed_forward.gate_up_proj_adapter_list.1.0.weight",
        "model.layers.0.mamba.D",
        "extra",
    ]
    assert [name for name in unread + read_or_unknown if ignored(SEVEN_B, name)] == unread


# Of a parameter, and of its part of a tensor.
FORMS = [
    (Form.SAME, (5,), (5,)),
    (Form.SAME, (5, 3), (5, 3)),
    (Form.CONV, (4, 6), (6, 1, 4)),
    (Form.HEAD_ROWS, (6,), (2, 3)),
    (Form.HEAD_ROWS, (6, 5), (2, 3, 5)),
    (Form.HEAD_COLUMNS, (4, 6), (2, 4, 3)),
    (Form.VECTOR, (24,), (2, 3, 4)),
]


@pytest.mark.parametrize(("form", "shape", "theirs"), FORMS, ids=str)
def test_a_form_and_its_inverse(form, shape, theirs):
    array = np.arange(np.prod(shape)).reshape(shape)
    part = form.to_hf(array, theirs)
    assert part.shape == theirs
    np.testing.assert_array_equal(form.from_hf(part), array)
    index = (slice(1, 3), slice(0, 2))[: len(shape)]
    if (place := form.part_index(index)) is not None:
        np.testing.assert_array_equal(form.from_hf(part[place]), array[index])


def test_heads_stand_one_after_the_other():
    assert Form.HEAD_COLUMNS.from_hf(np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])).tolist() == [
        [1, 2, 5, 6],
        [3, 4, 7, 8],
    ]
