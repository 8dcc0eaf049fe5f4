"""The families of models, by the `model_type` of their config.json. Nothing above `models` names a family."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2_jax.files import read_json
from zamba2_jax.nn.config import ModelConfig

if TYPE_CHECKING:
    from flax import nnx

    from zamba2_jax.models.base import LanguageModel
    from zamba2_jax.models.flops import ForwardFlops
    from zamba2_jax.models.tensors import Tensor
    from zamba2_jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """All that the floors above have to know of a kind of model. What needs JAX is behind a function.

    Attributes:
        config: its architecture; `config.model_type` is the family's name.
        presets: architectures by name.
        read_json: the architecture that the content of a config.json describes; raises ValueError.
        write_json: the content of config.json; raises ValueError for what has no such form.
        model: gives the class of the model.
        tensors: the table of a checkpoint: every tensor of it, each parameter in exactly one of them.
        ignored: whether an extra tensor of that name is one that checkpoints carry and no call reads.
        forward_flops: FLOPs of a forward pass per token, in rows of a length; see `models.flops`.
    """

    config: type[ModelConfig]
    presets: Mapping[str, Any]
    read_json: Callable[[dict[str, Any]], Any]
    write_json: Callable[[Any], dict[str, Any]]
    model: Callable[[], type[LanguageModel]]
    tensors: Callable[[Any], list[Tensor]]
    ignored: Callable[[Any, str], bool]
    forward_flops: Callable[[Any, int], ForwardFlops]


def family_in(package: str, *, model: str, **rest: Any) -> Family:
    """The family of a folder, whose modules that need JAX are imported when they are asked for.

    Args:
        package: of the folder; it has `model`, `weights` (tensors, ignored) and `flops` (forward_flops).
        model: the class in `model`.
        **rest: what needs no JAX: config, presets, read_json, write_json.
    """

    def deferred(module: str, name: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(importlib.import_module(f"{package}.{module}"), name)(*arguments)

    return Family(
        model=lambda: getattr(importlib.import_module(f"{package}.model"), model),
        tensors=deferred("weights", "tensors"),
        ignored=deferred("weights", "ignored"),
        forward_flops=deferred("flops", "forward_flops"),
        **rest,
    )


_OWN = {
    "zamba2": "zamba2_jax.models.zamba2.family",
    "zamba": "zamba2_jax.models.zamba1.family",
    "mamba2": "zamba2_jax.models.mamba2.family",
    "llama": "zamba2_jax.models.transformer.llama",
    "mistral": "zamba2_jax.models.transformer.mistral",
}
DEFAULT = "zamba2"
"""The family of what names none: early config.json files, and architectures in runs."""
_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family, for this process.

    Raises:
        ValueError: there is one of that name, or of a preset's name.
    """
    name = family.config.model_type
    if name in families():
        raise ValueError(f"family {name!r} is there already: expected another model_type than {', '.join(families())}")
    known = presets()
    for preset in family.presets:
        if preset in known:
            raise ValueError(f"preset {preset!r} of family {name!r} is there already")
    _registered[name] = family


def families() -> list[str]:
    """The names of all families."""
    return [*_OWN, *_registered]


def family(model_type: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(model_type, str):
        raise ValueError(f"model_type={model_type!r}: expected one of {', '.join(families())}")
    if model_type in _OWN:
        return importlib.import_module(_OWN[model_type]).FAMILY
    if model_type not in _registered:
        raise ValueError(f"model_type {model_type!r} is unknown, expected one of {', '.join(families())}")
    return _registered[model_type]


def family_of(config: ModelConfig) -> Family:
    """The family of an architecture."""
    return family(config.model_type)


def presets() -> dict[str, ModelConfig]:
    """The presets of all families, by name."""
    return {name: config for of in families() for name, config in family(of).presets.items()}


def preset(name: str, **overrides: Any) -> Any:
    """The architecture of that name, with other values for some of its fields.

    `preset("zamba2-1.2b", num_layers=12, hybrid_layer_ids=(5, 11))` is a smaller one of its kind. Without a shared
    block: `hybrid_layer_ids=(), num_shared_blocks=0`; without adapters: `adapter_rank=0, attention_adapters=False`.

    Raises:
        ValueError: no such preset or field, or a value breaks a rule.
    """
    known = presets()
    if name not in known:
        raise ValueError(f"preset {name!r} is unknown, expected one of {', '.join(known)}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"{key} is not a field of preset {name!r}, expected one of {', '.join(fields)}")
    return dataclasses.replace(known[name], **overrides)


def read_config(source: str | Path | Mapping[str, Any]) -> Any:
    """Reads a Hugging Face config of any family, and any published generation of it.

    Args:
        source: a config.json, the directory that holds it, or its parsed content.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: its `model_type` names no family; or as that family's `read_json`.
    """
    if isinstance(source, Mapping):
        values: Any = dict(source)
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no config.json at {path}")
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return family(values.get("model_type", DEFAULT)).read_json(values)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The content of a model's config.json, as transformers reads and writes it.

    Raises:
        ValueError: the architecture has no such form.
    """
    return json.loads(json.dumps(family_of(config).write_json(config)))


def init_model(config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = "float32") -> LanguageModel:
    """A model with fresh parameters of compute dtype `dtype`; see `LanguageModel`."""
    return family_of(config).model()(config, rngs=rngs, dtype=dtype)
