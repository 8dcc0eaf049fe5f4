"""Hugging Face checkpoints in and out: every layout, every way a file can be wrong, and what reading costs."""

import dataclasses
import errno
import itertools
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoint.variants import VARIANTS
from tests.helpers import assert_close, forward, random_model, random_tokens
from zamba2_jax import Zamba2Config, load_hf, save_hf
from zamba2_jax.checkpoint import hf
from zamba2_jax.models.registry import config_json
from zamba2_jax.models.zamba2.weights import tensors
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.parallel.mesh import make_mesh

TWO_BLOCKS = VARIANTS["two-blocks"]
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def read(directory):
    """Every tensor of a checkpoint."""
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def write(directory, arrays, config):
    """A checkpoint of one file. `config` is ours, or the content of a config.json."""
    directory.mkdir(exist_ok=True)
    content = config if isinstance(config, dict) else config_json(config)
    (directory / "config.json").write_text(json.dumps(content))
    save_file(arrays, directory / "model.safetensors")
    return directory


def saved(directory, model, **options):
    save_hf(model, directory, **options)
    return directory


def one_file(directory):
    return (directory / "model.safetensors").read_bytes()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))


def with_dtypes(model, dtypes):
    """The model with some parameters, by path, in other dtypes."""
    arrays = {path: parameter[...] for path, parameter in named_parameters(model).items()}
    return with_values(model, arrays | {path: arrays[path].astype(dtype) for path, dtype in dtypes.items()})


@pytest.fixture(scope="module")
def model():
    return random_model(TWO_BLOCKS)


@pytest.fixture
def checkpoint(tmp_path, model):
    """A checkpoint of `model`, to be spoilt."""
    return saved(tmp_path / "checkpoint", model)


# Out and in again


@every_dtype
@every_variant
def test_what_is_saved_is_loaded(tmp_path, monkeypatch, config, dtype):
    monkeypatch.setattr(hf, "_BLOCK", 1000)  # smaller than most tensors, larger than most rows
    model = random_model(config, dtype)
    assert_same(load_hf(saved(tmp_path / "saved", model)), model)


def test_each_tensor_keeps_the_widest_dtype_of_its_parts(tmp_path, model):
    alone = {"calls.0.linear": "bfloat16", "layers.0.mamba.D": "float16", "layers.0.norm": "bfloat16"}
    mixed = with_dtypes(model, alone | {"layers.1.mamba.in_z": "bfloat16"})
    expected = with_dtypes(mixed, {"layers.1.mamba.in_z": "float32"})
    assert_same(load_hf(saved(tmp_path / "saved", mixed)), expected)


def test_files_split_at_the_size_limit(tmp_path, model):
    limit = 30_000
    directory = saved(tmp_path / "saved", model, max_shard_size=limit)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in directory.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, arrays in files.items() for name in arrays}
    sizes = {file: [array.nbytes for array in arrays.values()] for file, arrays in files.items()}
    total = sum(sum(size) for size in sizes.values())
    assert index["metadata"]["total_size"] == total
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes.values())
    assert len(files) < 2 * total / limit
    assert_same(load_hf(directory), model)


def test_files_are_readable_by_those_who_may_read_the_directory(checkpoint):
    (checkpoint / "plain").touch()
    assert {file.stat().st_mode for file in checkpoint.iterdir()} == {(checkpoint / "plain").stat().st_mode}


@every_dtype
def test_loading_into_a_compute_dtype_leaves_vectors_in_float32(tmp_path, model, dtype):
    stored = saved(tmp_path / "saved", model, dtype="bfloat16")
    rounded = with_dtypes(model, dict.fromkeys(named_parameters(model), "bfloat16"))
    assert_same(load_hf(stored), rounded)
    wanted = {path: dtype if p.ndim > 1 else "float32" for path, p in named_parameters(model).items()}
    assert_same(load_hf(stored, dtype=dtype), with_dtypes(rounded, wanted))


def test_float64_only_where_jax_has_it(checkpoint, model):
    with pytest.raises(ValueError, match="float64 only with jax_enable_x64"):
        load_hf(checkpoint, dtype="float64")
    with pytest.raises(ValueError, match="int8: expected a floating-point dtype"):
        load_hf(checkpoint, dtype="int8")
    with jax.enable_x64(True):
        wide = with_dtypes(model, dict.fromkeys(named_parameters(model), "float64"))
        assert_same(load_hf(checkpoint, dtype="float64"), wide)


# transformers


PARITY = "compares with transformers, which the parity extra installs"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=PARITY)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=PARITY)


@pytest.fixture
def reference(torch, transformers):
    """Makes random models of transformers. It shares the shared blocks only where it ties the head: here always."""

    def make(config, dtype="float32"):
        torch.manual_seed(0)
        theirs = transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**config_json(config)))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(0, 0.1)
        blocks = [theirs.model.layers[layer].shared_transformer for layer in config.hybrid_layer_ids]
        for call, block in enumerate(blocks):
            block.load_state_dict(blocks[call % config.num_shared_blocks].state_dict())
        return theirs.to(getattr(torch, dtype))

    return make


@every_dtype
@every_variant
def test_import_then_export_gives_the_bytes_that_transformers_wrote(tmp_path, reference, config, dtype):
    reference(config, dtype).save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    assert model.config == config
    ours = saved(tmp_path / "ours", model)
    assert one_file(ours) == one_file(tmp_path / "theirs")
    assert json.loads((ours / "config.json").read_text())["dtype"] == dtype


def test_files_that_transformers_split_load_as_one(tmp_path, reference):
    theirs = reference(TWO_BLOCKS)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "split", max_shard_size="30KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    assert_same(load_hf(tmp_path / "split"), load_hf(tmp_path / "one"))


@every_variant
def test_transformers_computes_the_same_from_what_is_saved(tmp_path, torch, transformers, config):
    model = random_model(config)
    directory = saved(tmp_path / "saved", model, max_shard_size=50_000, time_step_min=1e-30)
    assert load_hf(directory).config == dataclasses.replace(config, time_step_min=1e-30)
    theirs, info = transformers.Zamba2ForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    tokens = random_tokens(config, 2, 19)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens)), use_cache=False).logits
    assert_close(forward(model, tokens), expected.numpy(), 2e-5)


# The old layout


def old_name(name, config, in_proj):
    """The name in early files of a tensor of the current layout."""
    calls = {str(layer): call for call, layer in enumerate(config.hybrid_layer_ids)}
    if match := re.fullmatch(r"model\.layers\.(\d+)\.linear\.weight", name):
        return f"model.linear_layers.{calls[match[1]]}.weight"
    if match := re.fullmatch(r"model\.layers\.(\d+)\.shared_transformer\.(.*)", name):
        own = re.sub(r"_adapter_list\.(\d+)\.0", r"_lora_A_list.\1", match[2])
        own = re.sub(r"_adapter_list\.(\d+)\.1", r"_lora_B_list.\1", own)
        own = own.replace("gate_up_proj", "linear_fc1").replace("down_proj", "linear_fc2")
        return f"model.blocks.{calls[match[1]] % config.num_shared_blocks}.{own}"
    name = re.sub(r"^model\.layers\.(\d+)\.(mamba_decoder\.)?", r"model.mamba_layers.\1.", name)
    return name.replace("mamba.in_proj", in_proj)


def old_arrays(model, directory, in_proj):
    """The tensors of early files: every adapter slot in every block, and a buffer."""
    config, rng = model.config, np.random.default_rng(1)
    old = {old_name(name, config, in_proj): array for name, array in read(saved(directory, model)).items()}
    adapter = re.compile(r"model\.blocks\.\d+\.(.*_list)\.\d+\.weight")
    shapes = {match[1]: array.shape for name, array in old.items() if (match := adapter.fullmatch(name))}
    assert len(shapes) == (8 if config.attention_adapters else 2)
    for block, call, kind in itertools.product(range(config.num_shared_blocks), range(config.num_calls), shapes):
        unused = rng.standard_normal(shapes[kind], np.float32)
        old.setdefault(f"model.blocks.{block}.{kind}.{call}.weight", unused)
    return old | {"model.blocks.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}


def first_generation(config):
    """The config.json of the first published files."""
    hybrid = config.hybrid_layer_ids
    return {
        "model_type": "zamba2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "layers_block_type": ["g" if layer in hybrid else "m" for layer in range(config.num_layers)],
        "state_size": config.d_state,
        "conv_dimension": config.d_conv,
        "expansion_factor": config.expand,
        "mamba_headdim": config.mamba_head_dim,
        "mamba_ngroups": config.ngroups,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.kv_heads,
        "kv_channels": config.hidden_size // config.attention_heads,
        "ffn_hidden_size": config.ffn_size,
        "gated_linear_unit": True,
        "num_mem_blocks": config.num_shared_blocks,
        "lora_rank": config.adapter_rank,
        "use_shared_block_lora": True,
        "use_shared_attention_lora": config.attention_adapters,
        "ft_lora": False,
        "use_mem_rope": config.use_rope,
        "add_bias_linear": config.add_bias_linear,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
    }


@pytest.mark.parametrize("head", ["head stored", "head tied"])
@pytest.mark.parametrize("in_proj", ["mamba.in_proj", "mamba.in_proj.0"])
@every_variant
def test_the_old_layout_holds_the_same_model(tmp_path, config, in_proj, head):
    model = random_model(config)
    old = old_arrays(model, tmp_path / "current", in_proj)
    if head == "head stored":
        old.setdefault("lm_head.weight", old["model.embed_tokens.weight"])
    assert_same(load_hf(write(tmp_path / "old", old, first_generation(config))), model)


# Tied tensors

COPIES = {
    "lm_head.weight": "model.embed_tokens.weight",
    "model.layers.3.shared_transformer.self_attn.q_proj.weight": (
        "model.layers.0.shared_transformer.self_attn.q_proj.weight"
    ),
}


@pytest.mark.parametrize(("copy", "original"), COPIES.items(), ids=["head", "shared block"])
def test_copies_may_be_stored_if_they_are_equal(tmp_path, copy, original):
    model = random_model(dataclasses.replace(TWO_BLOCKS, vocab_size=5000))  # more rows than are compared at a time
    arrays = read(saved(tmp_path / "saved", model))
    same, changed = arrays[original], arrays[original].copy()
    changed[-1, -1] += 1
    assert_same(load_hf(write(tmp_path / "same", arrays | {copy: same}, model.config)), model)
    for other in (changed, same[1:], same.astype(np.float16)):
        with pytest.raises(ValueError, match=re.escape(f"{copy}: differs from {original}, to which it is tied")):
            load_hf(write(tmp_path / "other", arrays | {copy: other}, model.config))


# Meshes

SPECS = {
    "embed": ("tensor", "fsdp"),
    "norm": (None,),
    "layers.0.mamba.in_x": ("tensor", "fsdp"),
    "layers.0.mamba.in_bc": (None, "fsdp"),
    "layers.0.mamba.in_dt": ("tensor", "fsdp"),
    "layers.0.mamba.conv_x": (None, "tensor"),
    "layers.0.mamba.conv_bc": (None, None),
    "layers.0.mamba.A_log": ("tensor",),
    "layers.0.mamba.out": ("fsdp", "tensor"),
    "shared.1.attention.q_residual": ("tensor", "fsdp"),
    "shared.1.attention.v_embedded": ("tensor", "fsdp"),
    "shared.1.attention.o": ("fsdp", "tensor"),
    "shared.1.mlp.up": ("tensor", "fsdp"),
    "calls.2.attention.q_b": (("tensor", "fsdp"), None),
    "calls.2.mlp.a": (None, "fsdp"),
    "calls.2.linear": (None, "fsdp"),
}


@pytest.fixture
def reads(monkeypatch):
    """Bytes of every read from a file, by tensor."""
    counts = {}

    class View:
        def __init__(self, name, view):
            self.name, self.view = name, view
            self.get_shape, self.get_dtype = view.get_shape, view.get_dtype

        def __getitem__(self, index):
            values = self.view[index]
            counts.setdefault(self.name, []).append(values.nbytes)
            return values

    class File:
        def __init__(self, file, framework):
            self.content = real(file, framework=framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.content.keys()

        def get_slice(self, name):
            return View(name, self.content.get_slice(name))

    real = hf.safe_open
    monkeypatch.setattr(hf, "safe_open", File)
    return counts


def test_each_device_of_a_mesh_reads_its_slice(tmp_path, reads):
    model = random_model(dataclasses.replace(TWO_BLOCKS, vocab_size=98))
    directory, mesh = saved(tmp_path / "saved", model), make_mesh(fsdp=2, tensor=2)
    loaded = load_hf(directory, mesh=mesh)
    parameters = named_parameters(loaded)
    specs = {path: tuple(parameters[path][...].sharding.spec) for path in SPECS}
    assert specs == SPECS
    assert all(parameter[...].sharding.mesh == mesh for parameter in parameters.values())
    for tensor in tensors(model.config):
        shards = [[shard.data.nbytes for shard in parameters[p.path][...].addressable_shards] for p in tensor.parts]
        assert max(reads[tensor.name]) <= max(max(of_part) for of_part in shards), tensor.name
        assert sum(reads[tensor.name]) <= sum(sum(of_part) for of_part in shards), tensor.name
    assert_same(loaded, model)
    assert one_file(saved(tmp_path / "again", loaded)) == one_file(directory)


# What is wrong with a file


def test_one_error_lists_everything_that_is_wrong(checkpoint):
    arrays = read(checkpoint)
    old = "model.mamba_layers.1.mamba.in_proj.weight"
    gate_up = "model.layers.2.shared_transformer.feed_forward.gate_up_proj.weight"
    q = "model.layers.2.shared_transformer.self_attn.q_proj.weight"
    arrays[gate_up][44 + 3, 5] = np.nan
    arrays[q][7, 24 + 3] = np.nan
    arrays["model.layers.4.mamba.D"][2] = np.inf
    arrays["extra"] = np.zeros(3, np.float32)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1
    arrays["model.layers.1.mamba.out_proj.weight"] = arrays["model.layers.1.mamba.out_proj.weight"].T.copy()
    arrays["model.layers.3.linear.weight"] = arrays["model.layers.3.linear.weight"].astype(np.int8)
    arrays[old] = arrays["model.layers.1.mamba.in_proj.weight"]
    del arrays["model.layers.4.mamba.A_log"]
    save_file(arrays, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of the model") as caught:
        load_hf(checkpoint)
    assert sorted(caught.value.args[0].split("\n  ")[1:]) == [
        "extra: unexpected",
        "lm_head.weight: differs from model.embed_tokens.weight, to which it is tied",
        "model.layers.1.mamba.out_proj.weight: has shape [48, 24], expected [24, 48]",
        f"{gate_up}: not finite in rows 44 to 87",
        f"{q}: not finite in columns 24 to 47",
        "model.layers.3.linear.weight: has dtype I8, expected one of BF16, F16, F32, F64",
        "model.layers.4.mamba.A_log: missing",
        "model.layers.4.mamba.D: not finite in rows 0 to 5",
        f"{old}: unexpected beside model.layers.1.mamba.in_proj.weight, another name of the same tensor",
    ]


def only_pickles(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model-00001-of-00001.bin")


def truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def in_two_files(directory):
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    indexed("model.safetensors", "other.safetensors")(directory)


def indexed(*files):
    def spoil(directory):
        weight_map = {str(i): file for i, file in enumerate(files)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def removed(name):
    return lambda directory: (directory / name).unlink()


def overwritten(name, content):
    return lambda directory: (directory / name).write_bytes(content)


INDEX = "model.safetensors.index.json"
SPOILT = {
    "pickles": (only_pickles, ValueError, "pytorch_model-00001-of-00001.bin, no safetensors.*run code.*Convert them"),
    "truncated": (truncated, ValueError, "model.safetensors is not a valid safetensors file"),
    "no file": (removed("model.safetensors"), FileNotFoundError, "has neither model.safetensors nor"),
    "no config": (removed("config.json"), FileNotFoundError, "no config.json at"),
    "file above": (indexed("../model.safetensors"), ValueError, "names '../model.safetensors', expected files of its"),
    "file below": (indexed("a/model.safetensors"), ValueError, "names 'a/model.safetensors', expected files of its"),
    "file elsewhere": (indexed("/etc/hostname"), ValueError, "names '/etc/hostname', expected files of its own"),
    "directory above": (indexed(".."), ValueError, "names '..', expected files of its own directory"),
    "no name": (indexed(None), ValueError, "names None, expected files of its own directory"),
    "absent file": (indexed("model.safetensors", "b.safetensors"), FileNotFoundError, "b.safetensors, which is not"),
    "tensor twice": (in_two_files, ValueError, "is in .*model.safetensors and again in .*other.safetensors"),
    "no index": (overwritten(INDEX, b"[]"), ValueError, f"{INDEX} is not a valid index"),
    "no text": (overwritten(INDEX, b"\xff"), ValueError, f"{INDEX} is not a valid index"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=SPOILT)
def test_spoilt_directories_are_refused(checkpoint, spoil, error, message):
    spoil(checkpoint)
    with pytest.raises(error, match=message):
        load_hf(checkpoint)


# What stands before all names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_a_prefix_of_all_names_is_left_out(checkpoint, model, prefix):
    arrays = {f"{prefix}{name}": array for name, array in read(checkpoint).items()}
    save_file(arrays, checkpoint / "model.safetensors")
    assert_same(load_hf(checkpoint), model)
    arrays[f"{prefix}extra"] = np.zeros(3, np.float32)
    save_file(arrays, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(f":\n  {prefix}extra: unexpected") + "$"):
        load_hf(checkpoint)


def test_names_may_lack_the_model_s(tmp_path):
    untied = random_model(dataclasses.replace(TWO_BLOCKS, tie_embeddings=False))
    directory = saved(tmp_path / "saved", untied)
    arrays = {name.removeprefix("model."): array for name, array in read(directory).items()}
    assert "lm_head.weight" in arrays
    assert "embed_tokens.weight" in arrays
    save_file(arrays, directory / "model.safetensors")
    assert_same(load_hf(directory), untied)


def test_an_index_and_a_single_file_must_agree(tmp_path, model):
    directory = saved(tmp_path / "sharded", model, max_shard_size=50_000)
    whole = saved(tmp_path / "whole", model)
    shutil.copy(whole / "model.safetensors", directory)
    assert_same(load_hf(directory), model)
    other = saved(tmp_path / "other", with_dtypes(model, {"norm": "bfloat16"}))
    shutil.copy(other / "model.safetensors", directory)
    with pytest.raises(ValueError, match=r"holds model.safetensors and an .*index.json of other weights"):
        load_hf(directory)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_place(tmp_path, model):
    sharded, whole = saved(tmp_path / "sharded", model, max_shard_size=50_000), saved(tmp_path / "whole", model)
    assert hf.fingerprint(sharded) == hf.fingerprint(whole)
    other = with_values(model, {path: p[...] + (path == "norm") for path, p in named_parameters(model).items()})
    assert hf.fingerprint(saved(tmp_path / "other", other)) != hf.fingerprint(whole)


# The hub


def test_a_hub_repository_is_read_from_where_the_hub_puts_it(tmp_path, monkeypatch, model, checkpoint):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for blob in checkpoint.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    asked = {}

    def download(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load_hf("owner/name"), model)
    published = ["model-00001-of-00002.safetensors", INDEX, "config.json", "tokenizer.model", "model.bin", "code.py"]
    wanted = huggingface_hub.utils.filter_repo_objects(published, allow_patterns=asked["owner/name"])
    assert list(wanted) == published[:4]


def test_offline_and_impossible_sources_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"owner/name is not a directory here.*could not be fetched.*offline"):
        load_hf("owner/name")
    with pytest.raises(FileNotFoundError, match="is neither a directory nor the id of a hub repository"):
        load_hf(tmp_path / "absent")


# Writing


def test_a_directory_that_holds_something_is_left_alone(tmp_path, model):
    (tmp_path / "kept").write_text("kept")
    for target in (tmp_path, tmp_path / "kept"):
        with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
            save_hf(model, target)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ValueError, match="max_shard_size=0: expected at least 1 byte"):
        save_hf(model, tmp_path / "new", max_shard_size=0)


def test_an_empty_directory_or_a_link_to_one_is_filled(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert_same(load_hf(saved(tmp_path / "link", model)), model)
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, model):
    written = []

    def fill_the_disk(content, file, **options):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        save_file(content, file, **options)

    monkeypatch.setattr(hf, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_hf(model, tmp_path / "target", max_shard_size=50_000)
    assert written
    assert not list(tmp_path.iterdir())


# Memory

LARGE = Zamba2Config(
    hidden_size=1024,
    num_layers=2,
    hybrid_layer_ids=(1,),
    mamba_heads=32,
    attention_heads=16,
    kv_heads=16,
    ffn_size=4096,
    adapter_rank=32,
    tie_embeddings=False,
    vocab_size=60_000,
)

LOAD = """
import json, pathlib, sys
import jax
from zamba2_jax import load_hf

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

directory, dtype = json.loads(sys.argv[1])
jax.block_until_ready(jax.numpy.zeros(3))
before = status("VmRSS")
model = load_hf(directory, dtype=dtype)
print(json.dumps([status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model))]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize(
    ("stored", "files", "dtype"), [("bfloat16", 3, None), ("float32", 1, "bfloat16")], ids=["as stored", "cast"]
)
def test_loading_holds_the_model_and_little_else(tmp_path, stored, files, dtype):
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(stored)
    shapes = {name: t.shape for t in tensors(LARGE) for name in (t.name, *t.copies)}
    directory, weight_map = tmp_path / "large", {}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(LARGE)))
    for number in range(files):
        names = list(shapes)[number::files]
        save_file({name: np.resize(noise, shapes[name]) for name in names}, directory / f"{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", LOAD, json.dumps([str(directory), dtype])]
    added, held = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(directory)
    largest = max(np.prod(shape) for shape in shapes.values()) * noise.itemsize
    assert held > 3e8
    assert added <= held + largest + 200e6
