"""Batch norms in training: whose statistics are joined over ranks, and which are kept for evaluation.

A graph says nothing of running statistics, for nothing in training reads them. A program updates them all the
same, in the module and under the names of the original model.
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.errors import RewriteError
from autopar.op_kinds import short_name
from autopar.rewrite.expressions import Expression, Values, literal
from graphs.ir import ModuleInfo, Op, OpGraph

SPLIT = "autopar.batch_norm"
"""A batch norm whose rows are split over the ranks of an axis."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What `torch.nn.BatchNorm2d` keeps."""


def keeps_statistics(op: Op) -> bool:
    """Whether running statistics are updated where the op is."""
    return short_name(op) == "batch_norm" and bool(op.args[5]) and op.args[6] > 0


def check_batch_norms(graph: OpGraph) -> None:
    """Raises RewriteError for running statistics whose names are unknown."""
    for op in graph.ops:
        if keeps_statistics(op) and not _is_batch_norm(graph.modules, op.module):
            raise RewriteError(
                f"{op.name} (batch_norm, module {op.module or 'root'}) updates running statistics that are "
                "not those of a torch.nn.BatchNorm, so that a program would not know them; use that module, "
                "or pass no running statistics in training"
            )


def _is_batch_norm(modules: Mapping[str, ModuleInfo], path: str) -> bool:
    return path in modules and modules[path].defined_in == "torch.nn.modules.batchnorm"


def call_of(op: Op, values: Values, holder: str) -> Expression:
    """The call of the module with the statistics, whose expression is `holder`; of the function where there
    is none, or where it is not just its own weight and bias that come in."""
    x, weight, bias, _, _, _, _, eps = (literal(arg, values) for arg in op.args[:8])
    rows = [f"self.{op.kwargs['row_axis']}"] if op.target == SPLIT else []
    is_own = (weight, bias) in ((f"{holder}.weight", f"{holder}.bias"), ("None", "None"))
    if keeps_statistics(op) and is_own:
        return Expression(f"{holder}({', '.join([x, *rows])})")
    texts = [x, weight, bias, f"eps={eps}", *(f"rows={group}" for group in rows)]
    texts += [f"running={holder}"] if keeps_statistics(op) else []
    return Expression(f"batch_norm({', '.join(texts)})")
