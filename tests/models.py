"""Small models for the tests: hand-written ones, and Hugging Face families at a size that trains in no time.

Each `Case` builds a model without dropout and gives inputs with labels for any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 128
SEQUENCE = 16
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A model and its inputs, by name."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Mapping[str, Tensor]]

    def __str__(self) -> str:
        return self.name


class MLP(nn.Module):
    """Four linear layers with biases and a mean squared error."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return F.mse_loss(x, target)


class Bottleneck(nn.Module):
    """A residual block of a ResNet, with in-place ReLU and addition."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        result: Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    """A small residual network for images of 32 by 32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(8, 8, 1), Bottleneck(8, 8, 1))
        self.layer2 = nn.Sequential(Bottleneck(8, 16, 2), Bottleneck(16, 16, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        x = self.layer2(self.layer1(x))
        logits = self.fc(torch.flatten(self.avgpool(x), 1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class UNet(nn.Module):
    """Two levels down, two up, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = self._double(3, 8)
        self.down2 = self._double(8, 16)
        self.bottom = self._double(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge2 = self._double(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge1 = self._double(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _double(channels_in: int, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([self.up2(x), second], 1))
        x = self.merge1(torch.cat([self.up1(x), first], 1))
        return F.cross_entropy(self.head(x), labels)


class DLRM(nn.Module):
    """Embedding tables, dense features, pairwise interactions."""

    def __init__(self, num_tables: int = 4, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(100, width) for _ in range(num_tables))
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        pairs = (num_tables + 1) * num_tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor, clicked: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(features, features.transpose(1, 2))
        row, column = torch.tril_indices(features.shape[1], features.shape[1], -1)
        interactions = products[:, row, column]
        logits = self.top(torch.cat([x, interactions], 1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicked)


def tokens(batch: int, length: int = SEQUENCE) -> Tensor:
    """Token ids that depend on the batch size alone."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch))


def language(batch: int) -> dict[str, Tensor]:
    """Inputs and labels of a language model."""
    return {"input_ids": tokens(batch), "labels": tokens(batch).flip(1)}


def images(batch: int, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def classes(batch: int, count: int = 10) -> Tensor:
    return torch.arange(batch) % count


def hugging_face(
    head: str, config: str, inputs: Callable[[int], Mapping[str, Tensor]], **settings: Any
) -> Case:
    """A `transformers` model by the names of its head and configuration classes."""

    def build() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, head)(getattr(transformers, config)(**settings))
        return model

    return Case(config.removesuffix("Config").lower(), build, inputs)


def _bert_like(config: str, **more: Any) -> Case:
    settings = {
        "intermediate_size": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **more,
    }
    return hugging_face(f"{config.removesuffix('Config')}ForMaskedLM", config, language, **TEXT, **settings)


def _llama_like(config: str, **more: Any) -> Case:
    settings = {"intermediate_size": 128, "num_key_value_heads": 2, **TEXT, **SPECIAL, **more}
    return hugging_face(f"{config.removesuffix('Config')}ForCausalLM", config, language, **settings)


def _vision(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": images(batch), "labels": classes(batch, 2)}


def _clip_inputs(batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch), "pixel_values": images(batch), "return_loss": True}


def _whisper_inputs(batch: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 8, 2 * SEQUENCE, generator=torch.Generator().manual_seed(batch))
    return {"input_features": features, "labels": tokens(batch)}


def _encoder_decoder(batch: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch), "labels": tokens(batch, SEQUENCE // 2)}


_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}

HANDWRITTEN = (
    Case("mlp", MLP, lambda batch: {"x": images(batch)[:, 0, :, :], "target": images(batch)[:, 1, :, :]}),
    Case("resnet", ResNet, lambda batch: {"images": images(batch), "labels": classes(batch)}),
    Case("unet", UNet, lambda batch: {"images": images(batch), "labels": (images(batch)[:, 0] > 0).long()}),
    Case(
        "dlrm",
        DLRM,
        lambda batch: {
            "dense": images(batch)[:, 0, 0, :13],
            "sparse": tokens(batch, 4) % 100,
            "clicked": (classes(batch, 2)).float(),
        },
    ),
)

GPT2 = hugging_face(
    "GPT2LMHeadModel",
    "GPT2Config",
    language,
    n_embd=64,
    n_layer=2,
    n_head=4,
    vocab_size=VOCAB,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=1,
)
LLAMA = _llama_like("LlamaConfig")
BERT = _bert_like("BertConfig")
MIXTRAL = _llama_like("MixtralConfig", num_local_experts=4)
T5 = hugging_face(
    "T5ForConditionalGeneration",
    "T5Config",
    _encoder_decoder,
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    vocab_size=VOCAB,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)

HUGGING_FACE = (
    GPT2,
    LLAMA,
    _llama_like("MistralConfig"),
    _llama_like("Qwen2Config"),
    _llama_like("Qwen3Config", head_dim=16),
    _llama_like("Gemma2Config", head_dim=16),
    hugging_face(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        language,
        **TEXT,
        **SPECIAL,
        intermediate_size=128,
        num_key_value_heads=2,
        head_dim=16,
    ),
    _llama_like("Phi3Config"),
    hugging_face(
        "OPTForCausalLM",
        "OPTConfig",
        language,
        **TEXT,
        **SPECIAL,
        ffn_dim=128,
        word_embed_proj_dim=64,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    hugging_face(
        "BloomForCausalLM",
        "BloomConfig",
        language,
        vocab_size=VOCAB,
        hidden_size=64,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **SPECIAL,
    ),
    hugging_face("FalconForCausalLM", "FalconConfig", language, **TEXT, **SPECIAL, alibi=False),
    hugging_face(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        language,
        **TEXT,
        **SPECIAL,
        intermediate_size=128,
        hidden_dropout=0.0,
    ),
    hugging_face(
        "MambaForCausalLM",
        "MambaConfig",
        language,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        **SPECIAL,
    ),
    MIXTRAL,
    _llama_like(
        "Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    hugging_face(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        language,
        **TEXT,
        **SPECIAL,
        num_key_value_heads=4,
        intermediate_size=128,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    BERT,
    _bert_like("RobertaConfig", max_position_embeddings=64),
    T5,
    hugging_face(
        "BartForConditionalGeneration",
        "BartConfig",
        _encoder_decoder,
        vocab_size=VOCAB,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        dropout=0.0,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
        **SPECIAL,
    ),
    hugging_face(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _whisper_inputs,
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=SEQUENCE,
        max_target_positions=64,
        dropout=0.0,
        decoder_start_token_id=0,
        **SPECIAL,
    ),
    hugging_face("ViTForImageClassification", "ViTConfig", _vision, **_VISION, hidden_dropout_prob=0.0),
    hugging_face(
        "CLIPModel",
        "CLIPConfig",
        _clip_inputs,
        text_config={**TEXT, **SPECIAL, "intermediate_size": 128, "max_position_embeddings": 64},
        vision_config=_VISION,
        projection_dim=32,
    ),
    hugging_face(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        _vision,
        **{**_VISION, "mlp_ratio": 2},
        drop_path_rate=0.0,
    ),
)

ALL = (*HANDWRITTEN, *HUGGING_FACE)


def case(name: str) -> Case:
    """The case of that name."""
    return next(item for item in ALL if item.name == name)
