"""Training inputs of Hugging Face models: random tokens or images, and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_IMAGE_SIZE = 224  # where a configuration says nothing: convolutional networks take any

Inputs = Callable[[int], Mapping[str, Tensor]]


def inputs_for(config: Any, class_name: str, seq_len: int) -> Inputs:
    """Keyword arguments of forward for a batch size, the same at every call.

    Args:
        config: the model's configuration.
        class_name: of the model; its ending says what it is trained on.
        seq_len: tokens per sample, `labels` the same number.

    Raises `ValueError` for a model that is trained on something else than tokens or images with labels.
    """
    if class_name.endswith(
        ("ForCausalLM", "LMHeadModel", "MTModel", "ForMaskedLM", "ForConditionalGeneration")
    ):
        if hasattr(config, "num_mel_bins"):
            return _speech(config, seq_len)
        return _language(int(config.get_text_config().vocab_size), seq_len)
    if class_name.endswith("ForSequenceClassification"):
        return _classified_text(int(config.get_text_config().vocab_size), int(config.num_labels), seq_len)
    if class_name.endswith("ForImageClassification"):
        return _classified_images(config)
    raise ValueError(
        f"what {class_name} is trained on is not known; write a function that returns (model, inputs), "
        "and give it as path.py:function"
    )


def _random_tokens(generator: torch.Generator, vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=generator)


def _seeded(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch)


def _language(vocabulary: int, seq_len: int) -> Inputs:
    """Tokens and labels; two distinct tensors, since an export would take one object for one input."""

    def inputs(batch: int) -> Mapping[str, Tensor]:
        tokens = _random_tokens(_seeded(batch), vocabulary, batch, seq_len)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return inputs


def _classified_text(vocabulary: int, classes: int, seq_len: int) -> Inputs:
    def inputs(batch: int) -> Mapping[str, Tensor]:
        generator = _seeded(batch)
        tokens = _random_tokens(generator, vocabulary, batch, seq_len)
        return {"input_ids": tokens, "labels": _random_tokens(generator, classes, batch)}

    return inputs


def _classified_images(config: Any) -> Inputs:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", _IMAGE_SIZE)
    size = size if isinstance(size, int) else size[0]

    def inputs(batch: int) -> Mapping[str, Tensor]:
        generator = _seeded(batch)
        pixels = torch.randn(batch, vision.num_channels, size, size, generator=generator)
        return {"pixel_values": pixels, "labels": _random_tokens(generator, int(config.num_labels), batch)}

    return inputs


def _speech(config: Any, seq_len: int) -> Inputs:
    """Mel frames for the encoder (two per position) and a transcript for the decoder."""
    frames = 2 * int(config.max_source_positions)
    length = min(seq_len, int(config.max_target_positions))

    def inputs(batch: int) -> Mapping[str, Tensor]:
        generator = _seeded(batch)
        features = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
        return {
            "input_features": features,
            "labels": _random_tokens(generator, config.vocab_size, batch, length),
        }

    return inputs
