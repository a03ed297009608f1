"""autopar plans how to train a model on many accelerators, and writes the program that does it.

    import autopar

    plan = autopar.plan(model, "dgx-h100*8", inputs=inputs, global_batch=512)
    print(plan.explain())
    autopar.compile(model, plan, inputs=inputs).save("program")
    autopar.launch(plan, "slurm").save("program")

`model` is any `nn.Module` that returns its loss; `inputs` are keyword tensors of its forward, or a function from a batch
size to them. Nothing needs an accelerator, nor memory for the model.
"""

from autopar.api import evaluate, plan
from autopar.compiler import compile, save_reference
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
from autopar.rewrite.program import Program

__all__ = [
    "Alternative",
    "AutoparError",
    "Certificate",
    "InfeasibleError",
    "InvalidParallelismError",
    "Launch",
    "Parallelism",
    "PinConflictError",
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
