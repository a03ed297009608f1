"""Which values of a local graph touch memory: ops that share a kernel pass the others in registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.op_kinds import CONSTANTS, kind_of
from costmodel.software import Fusion
from graphs.ir import Op, OpGraph


@dataclass(frozen=True)
class Traffic:
    """Storages that stay in the registers of a kernel.

    `unread` ones go from one memory-bound op to another in the same kernel, their only reader; a constant
    goes to all its readers so, as each can make it again. Changes of placement and views on the way do not
    count as readers, so a graph and its local form agree on both.
    `root` maps the storage of a converted tensor to the one it was converted from.
    """

    unread: frozenset[str]
    root: Mapping[str, str]

    @staticmethod
    def of(graph: OpGraph, fusion: Fusion = "chain") -> Traffic:
        """The traffic of a graph whose memory-bound ops share kernels as `fusion` says."""
        tensors = graph.tensors
        root: dict[str, str] = {}
        made_by: dict[str, Op] = {}
        readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            kind = kind_of(op, tensors)
            if kind == "communication":
                source = tensors[op.inputs[0]].storage
                root[op.output] = root.get(source, source)
                continue
            if kind != "view":
                if kind == "memory":
                    made_by.update(dict.fromkeys(op.outputs, op))
                for storage in {tensors[name].storage for name in op.inputs}:
                    readers.setdefault(root.get(storage, storage), []).append(op)
        kept = {root.get(tensors[name].storage, tensors[name].storage) for name in graph.outputs}

        def share_a_kernel(maker: Op, reader: Op) -> bool:
            if kind_of(reader, tensors) != "memory" or fusion == "none":
                return False
            return fusion == "chain" or maker.module == reader.module

        def is_unread(storage: str, ops: Sequence[Op]) -> bool:
            maker = made_by.get(storage)
            if maker is None or storage in kept or (len(ops) > 1 and maker.target not in CONSTANTS):
                return False
            return all(share_a_kernel(maker, reader) for reader in ops)

        unread = (storage for storage, ops in readers.items() if is_unread(storage, ops))
        return Traffic(frozenset(unread), root)

    def is_read(self, storage: str) -> bool:
        """Whether the storage, or its gradient, goes through memory."""
        return self.root.get(storage, storage) not in self.unread

    def __or__(self, other: Traffic) -> Traffic:
        return Traffic(self.unread | other.unread, {**self.root, **other.root})


EVERYTHING_TOUCHES_MEMORY = Traffic(frozenset(), {})
