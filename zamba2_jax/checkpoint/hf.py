"""Hugging Face checkpoints: any published layout in, the current one out."""

import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zamba2_jax.checkpoint.hub import local_directory
from zamba2_jax.files import read_json
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import config_json, family_of, init_model, read_config
from zamba2_jax.models.tensors import Tensor
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.parallel.mesh import check_mesh, parameter_sharding
from zamba2_jax.storage.local import write_directory
from zamba2_jax.storage.remote import is_remote
from zamba2_jax.typing import DTypeLike, param_dtype

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = 4_000_000_000

_FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}
_BLOCK = 1 << 24  # bytes of a file that are in memory at a time
_SAMPLE = 4096  # bytes of a tensor that a fingerprint reads in two places


def load_hf(
    source: str | os.PathLike[str], *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> LanguageModel:
    """Reads a checkpoint, tensor by tensor.

    Beside the model, memory holds one parameter at a time, and a block of the file it comes from.

    Args:
        source: a directory with config.json and safetensors, the URL of one in an object store, or the id of a
            repository on the Hugging Face hub.
        dtype: compute dtype: matrices are cast to it, vectors to at least float32. By default every tensor keeps
            the dtype it is stored in (float64 only with jax_enable_x64).
        mesh: places every parameter on it by `zamba2_jax.parallel.mesh`; each device then reads only its slice.

    Raises:
        FileNotFoundError: there is no such directory or repository, or it lacks a file.
        ValueError: the weights are pickles, the config or a file is not valid, or tensors are missing, unexpected,
            of a wrong shape or dtype, or not finite; all such tensors are listed. Or `dtype` is not one JAX can hold,
            or the mesh does not divide the model.
    """
    if dtype is not None:
        _check_dtype(jnp.dtype(dtype))
    directory = local_directory(source)
    config = read_config(directory)
    if mesh is not None:
        check_mesh(config, mesh)
    entries = find_entries(directory)
    found, problems = match(config, entries)
    model = jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0)))
    parameters = named_parameters(model)
    arrays: dict[str, jax.Array] = {}
    for tensor, entry in found:
        for part, places in zip(tensor.parts, tensor.places(), strict=True):
            parameter = parameters[part.path]
            target = _FLOATS[entry.dtype] if dtype is None else param_dtype(len(parameter.shape), dtype)
            read = _Reader(entry, tensor, places, parameter.shape, target)
            arrays[part.path] = _place(parameter, read, mesh)
            if read.not_finite:
                along = ("rows", "columns")[tensor.axis]
                problems.append(f"{entry.name}: not finite in {along} {places[0]} to {places[-1]}")
            if problems:
                del arrays[part.path]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{directory} is not a checkpoint of the model its config.json describes:\n  {listed}")
    return with_values(model, arrays)


def save_hf(
    model: LanguageModel,
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    time_step_min: float | None = None,
) -> None:
    """Writes config.json and safetensors in the current layout, which `transformers` and `load_hf` read.

    The directory appears whole or not at all; of one in an object store config.json is written last.

    Args:
        model: the model.
        directory: must not exist, or be empty; or the URL of one in an object store.
        dtype: of every tensor written; that of each parameter by default. Parameters that one tensor holds together
            are written in the widest of their dtypes.
        max_shard_size: bytes per file; a larger model is split over several, with an index.
        time_step_min: is written in place of the config's. transformers 5 clamps dt to it in a full pass; with 1e-30
            its plain `from_pretrained` computes what this package does, to which it is a number of the initialisation.

    Raises:
        FileExistsError: the directory holds something.
        ValueError: `max_shard_size` is below 1, `time_step_min` is not above 0 or above `time_step_max`, or
            transformers has no form for the architecture, or a parameter is in no tensor of it; or `time_step_min` is
            given for a model that has none.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size}: expected at least 1 byte")
    if is_remote(directory):
        local = partial(save_hf, model, dtype=dtype, max_shard_size=max_shard_size, time_step_min=time_step_min)
        write_directory(directory, local, last="config.json")
        return
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory")
    architecture = model.config
    if time_step_min is not None:
        if not hasattr(architecture, "time_step_min"):
            raise ValueError(
                f"time_step_min={time_step_min}: expected None, a {architecture.model_type} model has no such number"
            )
        architecture = dataclasses.replace(architecture, time_step_min=time_step_min)
    config = config_json(architecture) | {"dtype": str(jnp.dtype(dtype or model.dtype))}
    _check_covered(model)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    scratch.mkdir(parents=True)
    try:
        _write_json(scratch / "config.json", config)
        _write_weights(scratch, model, dtype, max_shard_size)
        for file in scratch.glob("*.safetensors"):  # safetensors lets only their owner read them
            shutil.copymode(scratch / "config.json", file)
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_covered(model: LanguageModel) -> None:
    """Whether every parameter is in the table."""
    covered = {part.path for tensor in family_of(model.config).tensors(model.config) for part in tensor.parts}
    if others := [name for name in named_parameters(model) if name not in covered]:
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(f"no tensor of a {model.config.model_type} checkpoint holds {listed}; expected only its own")


def _check_dtype(dtype: np.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype={dtype}: expected a floating-point dtype, float64 only with jax_enable_x64")


class Entry(NamedTuple):
    """A tensor in a file, as the file describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Reader:
    """Reads slices of one parameter from its part of a tensor, and notes whether all it read was finite.

    `places` are the rows, or columns, of the tensor that are the part.
    """

    def __init__(self, entry: Entry, tensor: Tensor, places: range, shape: tuple[int, ...], dtype: np.dtype):
        self.entry, self.tensor, self.places, self.shape, self.dtype = entry, tensor, places, shape, dtype
        self.not_finite = False

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(size)[along] for along, size in zip(index, self.shape, strict=True)]
        form, axis = self.tensor.form, self.tensor.axis
        found = form.part_index(tuple(slice(along.start, along.stop) for along in ranges))
        if found is None:  # of heads, whose tensors are small
            return np.ascontiguousarray(form.from_hf(self._read([slice(None)] * len(self.entry.shape)))[index])
        place, own = list(found), self.places[found[axis]]
        place[axis] = slice(own.start, own.stop)
        values = np.empty([len(along) for along in ranges], self.dtype)
        rows = form.to_hf(values, self.entry.shape)  # a view
        of_rows = own if axis == 0 else range(self.entry.shape[0])[place[0]]
        step = max(1, _BLOCK // (math.prod(self.entry.shape[1:]) * _FLOATS[self.entry.dtype].itemsize))
        for start in range(0, len(rows), step):
            now = of_rows[start : start + step]
            rows[start : start + step] = self._read([slice(now[0], now[-1] + 1), *place[1:]])[:: now.step]
        return values

    def _read(self, place: list[slice]) -> np.ndarray:
        # One opening per block: what a mapped file has shown stays in memory until it is closed.
        with safe_open(self.entry.file, framework="numpy") as file:
            block = file.get_slice(self.entry.name)[tuple(place)].astype(self.dtype)
        self.not_finite |= not bool(np.isfinite(block).all())
        return block


def _place(parameter: nnx.Param, read: _Reader, mesh: Mesh | None) -> jax.Array:
    """One parameter, read from its file on to its devices."""
    if mesh is None:
        # Not jnp.asarray, which copies twice; and not several copies in flight.
        return jax.device_put(read((slice(None),) * len(parameter.shape))).block_until_ready()
    sharding = parameter_sharding(parameter, mesh)
    return jax.make_array_from_callback(parameter.shape, sharding, lambda index: read(index or ()))


def find_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by its name, from the headers of its files.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are pickles, or a file is not valid, or an index names other weights than the single file.
    """
    if (directory / INDEX).is_file():
        files = _indexed_files(directory)
        single = directory / WEIGHTS
        if single.is_file() and single not in files and _digest([single]) != _digest(files):
            raise ValueError(f"{directory} holds {WEIGHTS} and an {INDEX} of other weights: expected one of the two")
    elif (directory / WEIGHTS).is_file():
        files = [directory / WEIGHTS]
    else:
        pickles = sorted(p.name for ending in ("bin", "pt", "pth", "ckpt") for p in directory.glob(f"*.{ending}"))
        if pickles:
            raise ValueError(
                f"{directory} holds {', '.join(pickles)}, no safetensors. Pickle files can run code when they are read "
                "and are refused. Convert them where you trust them: "
                "torch.load(..., weights_only=True), then safetensors.torch.save_file(..., 'model.safetensors')."
            )
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as content:
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    if name in entries:
                        raise ValueError(f"{name} is in {entries[name].file} and again in {file}")
                    view = content.get_slice(name)
                    entries[name] = Entry(name, file, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is not a valid safetensors file: {error}") from error
    return entries


def fingerprint(directory: Path) -> str:
    """A hash of a checkpoint: of its config.json, and of names, shapes, dtypes and some of the values of its tensors.

    Of each tensor the first and the middle values count, which takes milliseconds, and tells trained models apart.

    Raises:
        FileNotFoundError, ValueError: as `find_entries`.
    """
    files = sorted({entry.file for entry in find_entries(directory).values()})
    return hashlib.sha256((directory / "config.json").read_bytes() + _digest(files).encode()).hexdigest()


def _digest(files: list[Path]) -> str:
    """A hash of the tensors in some files, which does not depend on how they are spread over these."""
    tensors: list[str] = []
    for file in files:
        with file.open("rb") as content:
            try:
                header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
            except ValueError as error:
                raise ValueError(f"{file} is not a valid safetensors file: {error}") from error
            begin = content.tell()
            for name, value in header.items():
                if name == "__metadata__":
                    continue
                start, end = value["data_offsets"]
                sample = b""
                for place in (start, (start + end) // 2):
                    content.seek(begin + place)
                    sample += content.read(min(_SAMPLE, end - place))
                tensors.append(f"{name} {value['dtype']} {value['shape']} {hashlib.sha256(sample).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()


def _indexed_files(directory: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{directory / INDEX} is not a valid index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{directory / INDEX} names {name!r}, expected files of its own directory")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / INDEX} names {name}, which is not there")
    return [directory / name for name in names]


def match(config: ModelConfig, entries: dict[str, Entry]) -> tuple[list[tuple[Tensor, Entry]], list[str]]:
    """Pairs the model's table with what the files hold; and what is wrong about it, a line each.

    What all names have in front of those of the table, as "module." or "_orig_mod.", is left out; where all lack what
    the table has before its embedding, "model." say, but for the head, it is put there.
    """
    found, problems, used = [], [], set()
    table = family_of(config).tensors(config)
    entries = _named_as(table, entries)
    for tensor in table:
        names = [name for name in (tensor.name, *tensor.aliases) if name in entries]
        used.update(names)
        if not names:
            problems.append(f"{tensor.name}: missing")
            continue
        entry = entries[names[0]]
        copies = [name for name in tensor.copies if name in entries]
        used.update(copies)
        if len(names) > 1:
            problems.append(f"{names[1]}: unexpected beside {names[0]}, another name of the same tensor")
        elif entry.shape != tensor.shape:
            problems.append(f"{entry.name}: has shape {list(entry.shape)}, expected {list(tensor.shape)}")
        elif entry.dtype not in _FLOATS:
            problems.append(f"{entry.name}: has dtype {entry.dtype}, expected one of {', '.join(sorted(_FLOATS))}")
        else:
            found.append((tensor, entry))
            differing = [name for name in copies if not _equal(entries[name], entry)]
            problems += [f"{name}: differs from {entry.name}, to which it is tied" for name in differing]
    extra = sorted(name for name in set(entries) - used if not family_of(config).ignored(config, name))
    return found, problems + [f"{entries[name].name}: unexpected" for name in extra]


def _named_as(table: list[Tensor], entries: dict[str, Entry]) -> dict[str, Entry]:
    """Tensors by their names in the table, without what stands before all of them."""
    embedding = next(tensor for tensor in table if tensor.parts and tensor.parts[0].path == "embed")
    found = [
        (entry, root, name)
        for root, _, name in (known.partition(".") for known in (embedding.name, *embedding.aliases))
        for entry in entries
        if f".{entry}".endswith(f".{name}")
    ]
    if len(found) != 1 or found[0][0] == ".".join(found[0][1:]):
        return entries
    entry, root, name = found[0]
    prefix = entry.removesuffix(name).removesuffix(f"{root}.")
    if not all(other.startswith(prefix) for other in entries):
        return entries
    renamed = {other.removeprefix(prefix): of for other, of in entries.items()}
    if name in renamed:
        known = {known for tensor in table for known in (tensor.name, *tensor.aliases, *tensor.copies)}
        renamed = {other if other in known else f"{root}.{other}": of for other, of in renamed.items()}
    return renamed


def _equal(first: Entry, second: Entry) -> bool:
    """Whether two tensors hold the same, read a few rows at a time."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    with safe_open(first.file, framework="numpy") as a, safe_open(second.file, framework="numpy") as b:
        x, y = a.get_slice(first.name), b.get_slice(second.name)
        rows = (slice(i, min(i + 4096, first.shape[0])) for i in range(0, first.shape[0], 4096))
        return all(np.array_equal(x[s], y[s]) for s in rows)


def _write_weights(directory: Path, model: LanguageModel, dtype: DTypeLike | None, max_shard_size: int) -> None:
    parameters = {name: parameter[...] for name, parameter in named_parameters(model).items()}
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for tensor in family_of(model.config).tensors(model.config):
        size = int(np.prod(tensor.shape)) * _dtype(tensor, parameters, dtype).itemsize
        for name in (tensor.name, *(() if model.config.tie_embeddings else tensor.copies)):
            if shards[-1] and filled + size > max_shard_size:
                shards.append({})
                filled = 0
            shards[-1][name] = tensor
            filled += size
            total += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {name: _assemble(tensor, parameters, dtype) for name, tensor in shard.items()}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, file))
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _dtype(tensor: Tensor, parameters: dict[str, jax.Array], dtype: DTypeLike | None) -> np.dtype:
    """What a tensor of the checkpoint is written in."""
    paths = [part.path for part in tensor.parts] or ["embed"]  # an empty tensor has the dtype of the model
    held = [parameters[path] for path in paths]
    return jnp.dtype(dtype or jnp.result_type(*held))


def _assemble(tensor: Tensor, parameters: dict[str, jax.Array], dtype: DTypeLike | None) -> np.ndarray:
    """A tensor of the checkpoint, from the parameters it holds."""
    whole = tensor.join([np.asarray(parameters[part.path]) for part in tensor.parts])
    return np.ascontiguousarray(whole, dtype=_dtype(tensor, parameters, dtype))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
