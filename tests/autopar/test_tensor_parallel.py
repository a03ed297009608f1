"""Tensor parallelism as everybody knows it is found by the search, and written nowhere."""

from __future__ import annotations

import autopar
from graphs import capture
from tests.models import GPT2, LLAMA, Case

DEGREE = 2


def placements(case: Case) -> dict[str, str]:
    """Where the parameters of a model lie on a tensor axis of two ranks."""
    model = capture(case.build(), case.inputs, name=case.name)
    return dict(autopar.evaluate(model, "dgx-h100", global_batch=8, tp=DEGREE).placements)


def test_llama_is_split_by_columns_then_rows() -> None:
    found = placements(LLAMA)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert found[f"model.layers.*.{name}.weight"] == "tp S(0)"
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert found[f"model.layers.*.{name}.weight"] == "tp S(1)"


def test_fused_projections_are_split_in_each_of_their_parts() -> None:
    found = placements(GPT2)
    assert found["transformer.h.*.attn.c_attn.weight"] == "tp S(1, 3 sections)"
    assert found["transformer.h.*.attn.c_proj.weight"] == "tp S(0)"
    assert found["transformer.h.*.mlp.c_fc.weight"] == "tp S(1)"
    assert found["transformer.h.*.mlp.c_proj.weight"] == "tp S(0)"
