"""Tables that layers share are sliced once, where they are made."""

from __future__ import annotations

import pytest

import autopar
from autopar.plan import Parallelism
from autopar.rewrite.local import local_program
from graphs import capture
from tests.models import case


@pytest.mark.parametrize("name", ["llama", "gptneox", "qwen3"])
@pytest.mark.parametrize("pp", [1, 2])
def test_layers_share_one_slice_of_rotary_angles(name: str, pp: int) -> None:
    parallelism = Parallelism(cp=2, pp=pp, num_microbatches=pp, microbatch_size=2)
    captured = capture(case(name).build(), case(name).inputs, name=name)
    plan = autopar.evaluate(captured, f"local-cpu*{2 * pp}", parallelism=parallelism)
    local = local_program(captured, plan)
    tables = [op for op in local.graph.ops if op.target == "autopar.shard" and "rotary" in op.module]
    assert len(tables) == 2
    for op in tables:
        (whole,), (part,) = op.inputs, op.outputs
        assert local.graph.tensors[part].shape[1] * 2 == local.graph.tensors[whole].shape[1]
        assert str(local.states[part]["cp"]).startswith("S(1")
        layers = {local.graph.ops[reader].module.split(".")[2] for reader in local.graph.consumers[part]}
        assert layers == {"0", "1"}
    source = autopar.compile(captured, plan).source
    assert source.count("shard(torch.cos(") == source.count("shard(torch.sin(") == 1
