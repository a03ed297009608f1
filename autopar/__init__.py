"""autopar plans how to train a model on many accelerators, and writes the program that does it.

    import autopar

    plan = autopar.plan(model, "dgx-h100*8", inputs=inputs, global_batch=512)
    print(plan.explain())
    autopar.compile(model, plan, inputs=inputs).save("program")
    autopar.launch(plan, "slurm").save("program")

`model` is any `nn.Module` that returns its loss; `inputs` are keyword tensors of its forward, or a function
from a batch size to them. Nothing needs an accelerator, nor memory for the model. What needs torch is
imported on first use, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.errors import (
    AutoparError,
    InfeasibleError,
    InvalidParallelismError,
    PinConflictError,
    RewriteError,
    SearchTimeoutError,
)
from autopar.launch import Launch, launch
from autopar.plan import Alternative, Certificate, Parallelism, Plan, Prediction

if TYPE_CHECKING:
    from autopar.api import evaluate, plan
    from autopar.compiler import compile, save_reference
    from autopar.rewrite.program import Program
    from autopar.search.pins import Pins
else:
    del plan  # the module `autopar.plan`, which importing it left under the function's name

    _LAZY = {
        "Pins": "autopar.search.pins",
        "Program": "autopar.rewrite.program",
        "compile": "autopar.compiler",
        "evaluate": "autopar.api",
        "plan": "autopar.api",
        "save_reference": "autopar.compiler",
    }

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'autopar' has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


__all__ = [
    "Alternative",
    "AutoparError",
    "Certificate",
    "InfeasibleError",
    "InvalidParallelismError",
    "Launch",
    "Parallelism",
    "PinConflictError",
    "Pins",
    "Plan",
    "Prediction",
    "Program",
    "RewriteError",
    "SearchTimeoutError",
    "compile",
    "evaluate",
    "launch",
    "plan",
    "save_reference",
]
