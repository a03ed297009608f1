"""What Hugging Face models need around an export.

They are recognised by their looks: `transformers` is optional. In an export they would build a dense mask
even where attention is plainly causal, because a mask with padding cannot be told from one without; here it
can, from whether the caller gives one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

_TRACEABLE_ATTENTION = frozenset({"sdpa", "eager"})


@contextmanager
def prepared_for_export(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """No caches, attention that torch can trace, grouped experts, and no mask where none is given."""
    configs = _configs(model)
    before = [(config, dict(vars(config))) for config in configs]
    masks = sys.modules.get("transformers.masking_utils")
    try:
        for config in configs:
            _prepare(config)
        if masks is None or not configs:
            yield
            return
        replaced: dict[str, Any] = {"is_torchdynamo_exporting": lambda: False}
        if "position_ids" not in inputs:  # positions that the model counts itself never restart inside a row
            replaced["find_packed_sequence_indices"] = lambda position_ids: None
        with patch.multiple(
            masks, **{name: value for name, value in replaced.items() if hasattr(masks, name)}
        ):
            yield
    finally:
        for config, attributes in before:
            vars(config).clear()
            vars(config).update(attributes)


def _configs(model: nn.Module) -> list[Any]:
    """The distinct Hugging Face configurations in a model."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and hasattr(config, "to_dict"):
            found[id(config)] = config
    return list(found.values())


def _prepare(config: Any) -> None:
    if getattr(config, "use_cache", False):
        config.use_cache = False
    if config._attn_implementation not in _TRACEABLE_ATTENTION:
        config._attn_implementation = "sdpa"
    if getattr(config, "_experts_implementation", None) not in (None, "grouped_mm"):
        config._experts_implementation = "grouped_mm"
