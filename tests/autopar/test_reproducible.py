"""The same input gives the same plan and the same program, byte for byte, in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import autopar
from tests.models import TEXT, case, language
from transformers import AutoModelForCausalLM, Gemma3TextConfig

kinds = ["sliding_attention", "full_attention"]  # the model goes over a set of them
text = TEXT | {"num_hidden_layers": 4, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2}
config = Gemma3TextConfig(**text, layer_types=2 * kinds, sliding_window=8)
models = {"gemma3": (lambda: AutoModelForCausalLM.from_config(config), language)}
models |= {name: (case(name).build, case(name).inputs) for name in ("t5",)}
for name, (build, inputs) in models.items():
    torch.manual_seed(0)
    model = build()
    plan = autopar.plan(model, "local-cpu*2", inputs=inputs, global_batch=4, name=name)
    autopar.compile(model, plan, inputs=inputs, name=name).save(Path(sys.argv[1], name))
"""
SEEDS = ("1", "2")
"""Of the hashes of strings; with these two the set is gone over in either order."""


@pytest.mark.slow
def test_plans_and_programs_do_not_follow_the_order_of_sets(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WRITE, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            cwd=tmp_path,
        )
        for seed in SEEDS
    ]
    assert [each.wait() for each in started] == [0, 0]
    one, other = (
        {str(path.relative_to(tmp_path / seed)): path.read_bytes() for path in (tmp_path / seed).rglob("*.*")}
        for seed in SEEDS
    )
    assert {f"{name}/{file}" for name in ("gemma3", "t5") for file in ("plan.json", "model.py")} < one.keys()
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set()
