"""What each block of a program keeps for the backward, as source: one named constant for every distinct set
of results, and a table of blocks where they differ.

A plan names the ops whose results are kept. Under `torch.utils.checkpoint` a program knows them by kind and
number: the second matrix product of a block, its first attention (`autopar_runtime.keep`). Blocks of one
entry of the plan are alike, so the numbers of the first are those of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from autopar.errors import RewriteError
from autopar.kernels import CONJUGATES
from autopar.module_paths import module_ranges
from autopar.op_kinds import EXCHANGES, is_conversion, short_name
from autopar.plan import Recomputation
from autopar.runtime.experts import has_grouped_kernel
from graphs.ir import Op, OpGraph

POLICIES = {"full": "keep_nothing", "selective": "keep_matmuls"}
"""What the runtime calls that which a block keeps, by recompute mode."""

_WHY_NOT = {
    "attention": "torch's attention keeps no probabilities that could be computed again, so 'none' keeps as "
    "much",
    "alternate": "programs keep all matrix products, none, or those that a plan names",
}

_PRODUCTS = (
    "linear", "mm", "addmm", "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_grouped_mm",
)  # fmt: skip
_BATCHED = ("bmm", "baddbmm", "einsum")


@dataclass(frozen=True)
class Recomputing:
    """How a program calls its blocks: `policies` says by path what those keep that compute again, by the name
    of a function of the runtime or of a constant, `lines` define these constants, `table` is where loops look
    it up, and `is_mixed` says whether blocks differ."""

    policies: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    is_mixed: bool = False

    def kept(self, path: str) -> str:
        """The further argument of the call of one block, or of blocks that all keep the same."""
        policy = self.policies.get(path)
        return "" if policy is None else f", keep={policy}"


def check_recomputation(plan: Iterable[Recomputation]) -> None:
    """Raises RewriteError for a mode that is not emitted."""
    for each in plan:
        if each.mode in _WHY_NOT:
            raise RewriteError(
                f"recompute={each.mode!r} can be evaluated but not emitted: {_WHY_NOT[each.mode]}; plan with "
                "one of none, full, selective, mixed"
            )


def recomputing(plan: Sequence[Recomputation], graph: OpGraph, block_paths: frozenset[str]) -> Recomputing:
    """How the blocks of a program are called; `graph` is what one rank runs.

    Raises RewriteError for an op that the graph does not have.
    """
    policies: dict[str, str] = {}
    constants: dict[str, tuple[str, list[str]]] = {}
    for each in plan:
        paths = [path for path in each.blocks if path in block_paths]
        if not paths:
            continue
        if each.mode == "kept":
            text = f"keep({_numbers(graph, each)})"
            name, _ = constants.setdefault(text, (f"KEEP_{len(constants) + 1}", list(each.labels)))
        else:
            name = POLICIES[each.mode]
        policies.update(dict.fromkeys(paths, name))
    is_mixed = len({policies.get(path) for path in block_paths}) > 1
    lines = []
    if constants:
        lines.append("# Results that blocks keep when they compute the rest again, by kind and number.")
        for text, (name, labels) in constants.items():
            lines += [*wrap(f"# {', '.join(labels)}:", 100, subsequent_indent="# "), f"{name} = {text}"]
    return Recomputing(policies, tuple(lines), tuple(_table(policies)), is_mixed)


def _table(policies: Mapping[str, str]) -> list[str]:
    """The lines of `KEPT`, with a run of blocks in one line."""
    lines = [
        "# What blocks keep that compute the rest again in the backward; blocks not named here keep all.",
        "KEPT = {",
    ]
    for policy in dict.fromkeys(policies.values()):
        mine = [path for path, name in policies.items() if name == policy]
        for span in module_ranges(mine):
            prefix, _, last = span.rpartition("-")
            stem = prefix.rstrip("0123456789")
            if last.isdigit() and span not in mine:
                numbers = f"range({prefix.removeprefix(stem)}, {int(last) + 1})"
                lines.append(f'    **dict.fromkeys([f"{stem}{{i}}" for i in {numbers}], {policy}),')
            else:
                lines.append(f'    "{span}": {policy},')
    return [*lines, "}"]


def _numbers(graph: OpGraph, wanted: Recomputation) -> str:
    """The arguments of `keep`: of each kind, which ops of the first block are kept."""
    known = {op.name for op in graph.ops}
    unknown = [name for name in wanted.kept if name not in known]
    if unknown:
        raise RewriteError(
            f"the plan keeps the results of {', '.join(unknown)} in {wanted.blocks[0]}, which the model does "
            "not have; the plan was made for another model"
        )
    kept: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    for op in _inside(graph.ops, wanted.blocks[0]):
        kind, count = _dispatched(op, graph)
        if op.name in wanted.kept or op.target in EXCHANGES:  # rows travel once
            kept.setdefault(kind, []).extend(range(counts[kind], counts[kind] + count))
        counts[kind] += count
    return ", ".join(f"{kind}={numbers}" for kind, numbers in sorted(kept.items()) if kind)


def _inside(ops: Iterable[Op], path: str) -> Iterable[Op]:
    return (op for op in ops if op.module == path or op.module.startswith(f"{path}."))


def _dispatched(op: Op, graph: OpGraph) -> tuple[str, int]:
    """As which kind of op a program runs it, and as how many; "" for kinds that are never kept."""
    name = short_name(op)
    if is_conversion(op):
        return ("collectives", 1) if CONJUGATES[name][0] else ("", 0)
    if op.target in EXCHANGES:
        return "collectives", 1
    if "scaled_dot_product" in name:
        return "attention", 2 if op.kwargs.get("zigzag") else 1  # each slice of the queries by itself
    if name == "grouped_mm_fallback":  # without a kernel the runtime multiplies one expert after the other
        weight = graph.tensors[op.inputs[1]]
        return "products", 1 if has_grouped_kernel(weight.dtype, weight.shape) else weight.shape[0]
    if name == "matmul":
        dims = [len(graph.tensors[operand].shape) for operand in op.inputs]
        return ("batched_products" if min(dims) > 2 else "products"), 1
    if name in _BATCHED:
        return "batched_products", 1
    return ("products", 1) if name in _PRODUCTS else ("", 0)
