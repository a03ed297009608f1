"""A small sibling of a model: the same architecture, sized to train on a laptop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from autopar.models import ModelSpec, from_hugging_face_config

_MIN_HEAD_DIM = 8
_MIN_WIDTH = 64
_KV_HEADS = 4
_MAX_GROUP = 4
_VOCABULARY = 512
_EXPERTS = 8
_MIN_MULTIPLE = 32

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
_HEADS = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIMS = ("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
_WIDTHS = (
    "intermediate_size",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "kv_lora_rank",
    "q_lora_rank",
)
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def small(
    spec: ModelSpec, *, num_layers: int = 4, seq_len: int = 64, dtype: torch.dtype = torch.float32
) -> ModelSpec:
    """A sibling of the same architecture with few, narrow layers and no dropout.

    The ratio of query to key-value heads is kept up to 4, feed-forward widths keep theirs to the hidden size;
    the number of heads of either kind is divisible by 4. A model that is not from a Hugging Face
    configuration is returned
    as it is: its size is in its own code.
    """
    if spec.config is None:
        return spec
    config = copy.deepcopy(spec.config)
    _shrink(config, num_layers, max(seq_len, _MIN_MULTIPLE))
    return from_hugging_face_config(
        config, f"{spec.name}-small", seq_len=seq_len, dtype=dtype, source=spec.source
    )


def _shrink(config: Any, num_layers: int, positions: int) -> None:
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _shrink(getattr(config, name), num_layers, positions)
    old = {name: value for name, value in config.to_dict().items() if not isinstance(value, Mapping)}
    hidden, heads = _first(old, _HIDDEN), _first(old, _HEADS)
    new: dict[str, Any] = {}
    if hidden and heads:
        kv_heads = _first(old, _KEY_VALUE_HEADS) or heads
        queries = _KV_HEADS * min(max(heads // kv_heads, 1), _MAX_GROUP)
        head_dim = max(_MIN_WIDTH // queries, _MIN_HEAD_DIM)
        width = queries * head_dim
        new |= (
            dict.fromkeys(_HIDDEN, width)
            | dict.fromkeys(_HEADS, queries)
            | dict.fromkeys(_HEAD_DIMS, head_dim)
        )
        new |= dict.fromkeys(_KEY_VALUE_HEADS, _KV_HEADS if kv_heads > 1 else 1)
        new |= {name: _scaled(old[name], width / hidden) for name in _WIDTHS if old.get(name)}
        new["rotary_dim"] = head_dim // 2
        if (
            old.get("expand") and old.get("state_size") and old.get("head_dim")
        ):  # heads of a state-space model
            new["num_heads"] = old["expand"] * width // head_dim
    depth = min(num_layers, _first(old, _LAYERS) or num_layers)
    new |= dict.fromkeys(_LAYERS, depth) | dict.fromkeys(_POSITIONS, positions)
    new |= {name: min(old[name], _EXPERTS) for name in _NUM_EXPERTS if old.get(name)}
    new["vocab_size"] = new["decoder_vocab_size"] = _VOCABULARY
    new["max_source_positions"] = positions
    _shrink_routing(old, new)
    _apply(config, old, new, depth)


def _shrink_routing(old: Mapping[str, Any], new: dict[str, Any]) -> None:
    """Groups of experts and leading dense layers, where a model has them."""
    experts = next((new[name] for name in _NUM_EXPERTS if name in new), None)
    if experts is None:
        return
    chosen = next(
        (name for name in ("num_experts_per_tok", "top_k", "num_experts_per_token") if old.get(name)), None
    )
    if chosen is not None:
        new[chosen] = min(old[chosen], max(experts // 4, 1) * 2)
    if old.get("n_group"):
        new["n_group"] = min(old["n_group"], 2)
        new["topk_group"] = 1
    if old.get("first_k_dense_replace"):
        new["first_k_dense_replace"] = 1


def _apply(config: Any, old: Mapping[str, Any], new: Mapping[str, Any], depth: int) -> None:
    """Set the fields a configuration has; thin out lists per layer, silence dropout, keep token ids small."""
    layers = _first(old, _LAYERS)
    for name, value in old.items():
        if value is None or (name not in vars(config) and not hasattr(config, name)):
            continue
        if name in new:
            setattr(config, name, new[name])
        elif layers is not None and isinstance(value, list) and len(value) == layers:
            setattr(
                config, name, [value[index * (layers - 1) // max(depth - 1, 1)] for index in range(depth)]
            )
        elif isinstance(value, float) and ("drop" in name or name.endswith("_prob")):
            setattr(config, name, 0.0)
        elif name.endswith("_token_id") and isinstance(value, int) and value >= _VOCABULARY:
            setattr(config, name, _VOCABULARY - 1)


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (settings[name] for name in names if settings.get(name))
    return next((value for value in found if isinstance(value, int)), None)


def _scaled(size: int, ratio: float) -> int:
    """A width at another scale, a multiple of 32."""
    return max(round(size * ratio / _MIN_MULTIPLE), 1) * _MIN_MULTIPLE
