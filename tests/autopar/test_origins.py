"""Classes of the program are called after what tells their modules apart."""

from __future__ import annotations

import re

import pytest

import autopar
from autopar.plan import Parallelism
from autopar.rewrite.origins import distinction
from graphs import capture
from tests.models import case


@pytest.mark.parametrize(
    ("path", "others", "word"),
    [
        ("decoder.block.0.layer.0.SelfAttention", ["encoder.block.0.layer.0.SelfAttention"], "Decoder"),
        ("decoder.layers.0.encoder_attn", ["encoder.layers.0.self_attn"], "EncoderAttn"),
        ("encoder.block.1", ["encoder.block.0"], ""),
        ("layer2.0", ["layer1.0", "layer1.1"], ""),
        ("1", ["0"], ""),
        ("", ["0"], ""),
    ],
)
def test_the_word_is_the_innermost_module_that_others_are_not_in(
    path: str, others: list[str], word: str
) -> None:
    assert distinction(f"{path}\nKind", [f"{each}\nKind" for each in others]) == word


def test_blocks_of_a_decoder_are_not_numbered_after_those_of_the_encoder() -> None:
    captured = capture(case("t5").build(), case("t5").inputs, name="t5")
    plan = autopar.evaluate(captured, "local-cpu", parallelism=Parallelism(microbatch_size=2))
    found = re.findall(r"class (T5Block\w*|T5Stack\w*)\(", autopar.compile(captured, plan).source)
    assert found == ["T5Block", "T5Block2", "T5Stack", "T5BlockDecoder", "T5BlockDecoder2", "T5StackDecoder"]
