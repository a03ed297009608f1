"""Models by name: what `autopar plan MODEL` accepts.

    llama3-8b             a published configuration from `autopar/data/models`
    path/to/config.json   a Hugging Face configuration, or the directory that holds one
    path.py:function      a function that returns a module, or `(module, inputs)` where inputs are keyword
                          arguments of forward, or a function from a batch size to them

Hugging Face models need `transformers`, which is optional.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from autopar.errors import AutoparError
from autopar.model_inputs import inputs_for
from graphs import build_without_memory, inputs_of_any_batch, uncollected
from hardware_db.errors import did_you_mean

DEFAULT_SEQUENCE_LENGTH = 4096
"""Longer contexts are asked for by name: few train at the full length their configuration allows."""


class ModelError(AutoparError):
    """The model is unknown, cannot be built, or does not say what its inputs are."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be built and fed.

    Attributes:
        name: what to call it.
        build: makes the module, with memory for its parameters.
        inputs: keyword arguments of forward for a batch size, labels included.
        seq_len: tokens per sample, None where the model has no such thing.
        config: its Hugging Face configuration, None for other models.
        source: where a published configuration is from.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Mapping[str, Tensor]]
    seq_len: int | None = None
    config: Any = None
    source: str | None = None

    def build_without_memory(self) -> nn.Module:
        """The module with its parameters on the meta device."""
        return build_without_memory(self.build)


@uncollected()  # it may import `transformers`
def load(spec: str, *, seq_len: int | None = None, dtype: torch.dtype | None = None) -> ModelSpec:
    """The model that `spec` names, see the module's docstring.

    Args:
        spec: a name, a path to a configuration, or `path.py:function`.
        seq_len: tokens per sample of a Hugging Face model, by default its longest, at most 4096.
        dtype: of the parameters, by default bfloat16 for configurations and as built for functions.

    Raises `ModelError`.
    """
    path, separator, function = spec.rpartition(":")
    if separator and path.endswith(".py"):
        return _from_function(Path(path), function, dtype)
    if (location := Path(spec)).exists():
        return _from_config_file(location, seq_len, dtype)
    return _published(spec, seq_len, dtype)


def published_models() -> tuple[str, ...]:
    """Names of the built-in published configurations, sorted."""
    folder = resources.files("autopar") / "data" / "models"
    return tuple(
        sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))
    )


def published_model(name: str) -> Mapping[str, Any]:
    """A built-in configuration as data: name, source, num_parameters, config.

    Raises `ModelError` that suggests what may have been meant.
    """
    known = published_models()
    if name not in known:
        raise ModelError(
            f"unknown model {name!r}{did_you_mean(name, known)}; "
            f"built in are {', '.join(known)}; others go by the path of a config.json or by path.py:function"
        )
    text = (resources.files("autopar") / "data" / "models" / f"{name}.json").read_text(encoding="utf-8")
    return cast("Mapping[str, Any]", json.loads(text))


def from_hugging_face_config(
    config: Any,
    name: str,
    *,
    seq_len: int | None = None,
    dtype: torch.dtype | None = None,
    source: str | None = None,
) -> ModelSpec:
    """A model from a `transformers` configuration.

    Raises `ModelError` where it has no known head or inputs.
    """
    model_class = _model_class(config)
    if (
        getattr(config, "is_encoder_decoder", False)
        and getattr(config, "decoder_start_token_id", None) is None
    ):
        config.decoder_start_token_id = (
            config.pad_token_id or 0
        )  # what shifts labels into the decoder's inputs
    length = seq_len or _default_sequence_length(config)
    try:
        inputs = inputs_for(config, model_class.__name__, length)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
    build = partial(_build, model_class, config, dtype or torch.bfloat16)
    return ModelSpec(name, build, inputs, length if "input_ids" in inputs(1) else None, config, source)


def _published(name: str, seq_len: int | None, dtype: torch.dtype | None) -> ModelSpec:
    entry = published_model(name)
    config = _auto_config(entry["config"])
    return from_hugging_face_config(config, name, seq_len=seq_len, dtype=dtype, source=entry["source"])


def _from_config_file(path: Path, seq_len: int | None, dtype: torch.dtype | None) -> ModelSpec:
    file = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} holds no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = f"; for a function in it, write {path}:function" if file.suffix == ".py" else ""
        raise ModelError(f"{file} is not JSON: {error}{hint}") from error
    name = file.parent.resolve().name if file.name == "config.json" else file.stem
    return from_hugging_face_config(
        _auto_config(settings), name, seq_len=seq_len, dtype=dtype, source=str(file)
    )


def _from_function(path: Path, name: str, dtype: torch.dtype | None) -> ModelSpec:
    function = _import_function(path, name)

    def parts() -> tuple[nn.Module, Any]:
        result = function()
        module, inputs = result if isinstance(result, tuple) else (result, None)
        if not isinstance(module, nn.Module):
            raise ModelError(
                f"{path}:{name} must return a module or (module, inputs), got {type(module).__name__}"
            )
        return (module if dtype is None else module.to(dtype)), inputs

    given: list[Any] = []

    def remember_inputs() -> nn.Module:
        module, inputs = parts()
        given.append(inputs)
        return module

    module = build_without_memory(remember_inputs)
    config = getattr(module, "config", None)
    if given[0] is not None:
        inputs = inputs_of_any_batch(given[0])
    elif hasattr(config, "to_dict"):
        inputs = inputs_for(config, type(module).__name__, _default_sequence_length(config))
    else:
        raise ModelError(
            f"{path}:{name} returns a {type(module).__name__} without saying what its inputs are; "
            "return (module, inputs), where inputs maps the names of forward's arguments, labels included, "
            "to tensors"
        )
    tokens = inputs(1).get("input_ids")
    seq_len = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() > 1 else None
    return ModelSpec(name, lambda: parts()[0], inputs, seq_len, source=f"{path}:{name}")


def _import_function(path: Path, name: str) -> Callable[[], Any]:
    if not path.is_file():
        raise ModelError(f"no file {path}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    assert spec is not None, f"{path} is a python file"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look the module up
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = [
            key for key, value in vars(module).items() if callable(value) and value.__module__ == spec.name
        ]
        raise ModelError(
            f"{path} has no function {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
        )
    return cast("Callable[[], Any]", function)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError("this model needs the package transformers: pip install 'autopar[hf]'") from error
    return transformers


def _auto_config(settings: Mapping[str, Any]) -> Any:
    if "model_type" not in settings:
        raise ModelError("the configuration has no field model_type, so it is none of Hugging Face's")
    try:
        return _transformers().AutoConfig.for_model(**settings)
    except ValueError as error:
        raise ModelError(f"transformers knows no model_type {settings['model_type']!r}") from error


def _model_class(config: Any) -> type[nn.Module]:
    """The class that the configuration names, else the causal or masked language model of its type."""
    transformers = _transformers()
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return cast("type[nn.Module]", getattr(transformers, name))
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            return cast("type[nn.Module]", auto._model_mapping[type(config)])
    raise ModelError(
        f"model_type {config.model_type!r} has no language model; set `architectures` in its configuration"
    )


def _build(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    return cast(nn.Module, model_class._from_config(config, dtype=dtype))


def _default_sequence_length(config: Any) -> int:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or DEFAULT_SEQUENCE_LENGTH
    return min(int(longest), DEFAULT_SEQUENCE_LENGTH)
