"""The model of a record: from sizes to a `transformers` configuration.

The architecture is chosen by structure, never by the model's name:

    latent attention                             deepseek_v2
    experts    with a window                     gpt_oss
               heads as wide as the residual     mixtral
               else                              qwen3_moe
    dense      gated feed-forward                llama
               ALiBi positions                   bloom
               tied, a value head for each head  gpt2
               else                              nemotron (squared ReLU, rotary positions)

Depth can be overridden: what repeats is captured once, so a few layers tell all. `layer_period` and
`num_special_layers` say how few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import torch

from autopar.models import ModelError, ModelSpec, from_hugging_face_config
from autopar.records.schema import ModelFacts, Record, RecordError
from autopar.records.software import habits, software_era

_LARGEST_PERIOD: Final = 12  # of layers with and without a window


@dataclass(frozen=True)
class ModelKey:
    """What tells two captured models apart: their structure, the dropout and the dtype of activations."""

    facts: ModelFacts
    dropout: float
    dtype: torch.dtype


def model_key(record: Record) -> ModelKey:
    """Equal, and hashable, for records of one model. Names and published parameter counts do not matter."""
    facts = record.model.model_copy(update={"family": "", "n_params": None})
    dtype = torch.float16 if record.precision == "fp16" else torch.bfloat16
    return ModelKey(facts, dropout_of(record), dtype)


def model_of(record: Record, *, num_layers: int | None = None) -> ModelSpec:
    """The model a record trained, with its sequence length, dtype and dropout.

    Args:
        record: the published run.
        num_layers: depth, by default the record's; leading dense layers and the pattern of windows stay.

    Raises `RecordError` for sizes that no known architecture has, `ModelError` without transformers.
    """
    key = model_key(record)
    facts = key.facts.model_copy(update={"layers": num_layers or key.facts.layers})
    _check(record.id, facts)
    config = _config(model_type(facts), facts, key.dropout)
    name = record.model.family or config.model_type
    return from_hugging_face_config(config, name, seq_len=facts.seq, dtype=key.dtype, source=record.source)


def dropout_of(record: Record) -> float:
    """The dropout probability: the record's, else none where it says so or the architecture has none.

    GPT with learned positions trained with dropout in some eras of software and without in others.
    """
    if record.model.dropout is not None:
        return record.model.dropout
    if "no dropout" in record.notes.lower() or model_type(record.model) != "gpt2":
        return 0.0
    return habits(software_era(record)).gpt_dropout


def layer_period(facts: ModelFacts) -> int:
    """After how many layers the pattern of layers repeats, leading dense layers aside."""
    if facts.window is None:
        return 1
    return Fraction(facts.window_frac).limit_denominator(_LARGEST_PERIOD).denominator


def num_special_layers(facts: ModelFacts) -> int:
    """Leading layers that are unlike the rest: dense ones in front of layers with experts."""
    return facts.dense_layers if facts.experts else 0


def _check(id: str, facts: ModelFacts) -> None:
    if facts.heads % facts.kv_heads:
        raise RecordError(
            f"record {id}: {facts.heads} heads cannot share {facts.kv_heads} kv_heads evenly; "
            "check model.heads and kv_heads"
        )
    if facts.head_dim is None and facts.hidden % facts.heads:
        raise RecordError(
            f"record {id}: hidden {facts.hidden} is no multiple of {facts.heads} heads; give model.head_dim"
        )
    if model_type(facts) == "bloom" and facts.ffn_hidden != 4 * facts.hidden:
        raise RecordError(
            f"record {id}: with ALiBi and without gates, ffn_hidden {facts.ffn_hidden} must be 4 * hidden "
            f"= {4 * facts.hidden}; no other model of that kind is known"
        )
    if facts.experts and not facts.topk:
        raise RecordError(f"record {id}: {facts.experts} experts without model.topk")


def model_type(facts: ModelFacts) -> str:
    """The architecture, by the name `transformers` gives it; see the module's docstring."""
    if facts.mla is not None:
        return "deepseek_v2"
    if facts.experts is not None:
        if facts.window is not None:
            return "gpt_oss"
        return "mixtral" if _head_dim(facts) * facts.heads == facts.hidden else "qwen3_moe"
    if facts.gated_mlp:
        return "llama"
    if facts.alibi:
        return "bloom"
    return "gpt2" if facts.tied_embed and facts.kv_heads == facts.heads else "nemotron"


def _head_dim(facts: ModelFacts) -> int:
    return facts.head_dim or facts.hidden // facts.heads


def _config(kind: str, facts: ModelFacts, dropout: float) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ModelError("records need the package transformers: pip install 'autopar[hf]'") from error
    sizes = _SIZES[kind](facts)
    # The tokens that begin and end a text must exist in the vocabulary.
    shared = {"vocab_size": facts.vocab, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    dropouts = dict.fromkeys(_DROPOUTS.get(kind, ("attention_dropout",)), dropout)
    return AutoConfig.for_model(kind, **shared, **dropouts, **sizes)


def _gpt2(facts: ModelFacts) -> dict[str, Any]:
    return {
        "n_positions": facts.seq,
        "n_embd": facts.hidden,
        "n_layer": facts.layers,
        "n_head": facts.heads,
        "n_inner": facts.ffn_hidden,
        "activation_function": "gelu_pytorch_tanh",  # the same function as one op
    }


def _bloom(facts: ModelFacts) -> dict[str, Any]:
    return {
        "hidden_size": facts.hidden,
        "n_layer": facts.layers,
        "n_head": facts.heads,
        "tie_word_embeddings": facts.tied_embed,
    }


def _decoder(facts: ModelFacts) -> dict[str, Any]:
    """What all decoders since Llama name alike."""
    return {
        "hidden_size": facts.hidden,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": _head_dim(facts),
        "intermediate_size": facts.ffn_hidden,
        "max_position_embeddings": facts.seq,
        "tie_word_embeddings": facts.tied_embed,
        "pad_token_id": None,
    }


def _all_experts(facts: ModelFacts) -> dict[str, Any]:
    """A decoder whose every layer has experts, and these the feed-forward's name."""
    return _decoder(facts) | {
        "intermediate_size": facts.expert_ffn or facts.ffn_hidden,
        "num_local_experts": facts.experts,
        "num_experts_per_tok": facts.topk,
    }


def _gpt_oss(facts: ModelFacts) -> dict[str, Any]:
    period = layer_period(facts)
    num_windows = round(facts.window_frac * period)
    kinds = ("sliding_attention", "full_attention")
    return _all_experts(facts) | {
        "sliding_window": facts.window,
        "layer_types": [kinds[index % period >= num_windows] for index in range(facts.layers)],
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        "attn_implementation": "flex_attention",  # one kernel; eager, its default, keeps the scores in memory
    }


def _some_experts(facts: ModelFacts) -> dict[str, Any]:
    """A decoder that may have dense layers besides those with experts."""
    return _decoder(facts) | {
        "moe_intermediate_size": facts.expert_ffn or facts.ffn_hidden,
        "num_experts_per_tok": facts.topk,
    }


def _qwen3_moe(facts: ModelFacts) -> dict[str, Any]:
    dense = list(range(facts.dense_layers))
    return _some_experts(facts) | {"num_experts": facts.experts, "mlp_only_layers": dense}


def _deepseek_v2(facts: ModelFacts) -> dict[str, Any]:
    latent = facts.mla
    assert latent is not None, "the architecture is chosen by it"
    return _some_experts(facts) | {
        "head_dim": latent.rope,
        "n_routed_experts": facts.experts,
        "n_shared_experts": facts.shared_experts,
        "first_k_dense_replace": facts.dense_layers,
        "q_lora_rank": latent.q_lora,
        "kv_lora_rank": latent.kv_lora,
        "qk_nope_head_dim": latent.nope,
        "qk_rope_head_dim": latent.rope,
        "v_head_dim": latent.v,
    }


_SIZES: Final[Mapping[str, Callable[[ModelFacts], dict[str, Any]]]] = {
    "bloom": _bloom,
    "deepseek_v2": _deepseek_v2,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "llama": _decoder,
    "mixtral": _all_experts,
    "nemotron": _decoder,
    "qwen3_moe": _qwen3_moe,
}
_DROPOUTS: Final = {
    "bloom": ("attention_dropout", "hidden_dropout"),
    "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
}
"""What the probabilities are called where `attention_dropout` is not the only one."""
