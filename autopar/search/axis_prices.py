"""What the choice of strategies on a mesh axis is judged by: by default the prices of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from autopar.pricing import OpCost, Pricer, total
from autopar.search.needs import Needs, needs_of
from autopar.strategies import Conversion
from autopar.traffic import Traffic
from graphs.ir import OpGraph


class Prices(Protocol):
    """What the choice is judged by."""

    def traffic(self, graph: OpGraph) -> Traffic:
        """Which values of a graph stay in registers."""
        ...

    def needs(self, graph: OpGraph) -> Needs:
        """What the backwards of its ops read."""
        ...

    def op(self, local: OpGraph, traffic: Traffic) -> OpCost:
        """What one op costs in its local form; `traffic` is that of the whole graph."""
        ...

    def exposed(self, cost: OpCost) -> OpCost:
        """What of it nothing hides."""
        ...

    def conversion_s(self, how: Conversion, num_bytes: float) -> float:
        """Time of a change of placement of a tensor of `num_bytes`, whole on the axis."""
        ...

    def reduction_s(self, num_bytes: float) -> float:
        """Time of summing a parameter's gradient over the axis, once a step."""
        ...


@dataclass(frozen=True)
class ClusterPrices:
    """The prices of a cluster, on the axis `axis` of its `pricer`, for a graph with these `parameters`."""

    pricer: Pricer
    axis: str
    parameters: frozenset[str] = frozenset()

    def traffic(self, graph: OpGraph) -> Traffic:
        return self.pricer.traffic(graph)

    def needs(self, graph: OpGraph) -> Needs:
        return needs_of(graph, self.pricer.kernels)

    def op(self, local: OpGraph, traffic: Traffic) -> OpCost:
        if len(local.ops) > 1:  # one alone shares no kernel
            traffic |= self.traffic(local)
        return total(self.pricer.op(part, local.tensors, traffic, self.parameters) for part in local.ops)

    def conversion_s(self, how: Conversion, num_bytes: float) -> float:
        backward = how.backward is not None
        cost = self.pricer.conversion(how.name, num_bytes, self.axis, backward=backward)
        return self.exposed(cost).total_s

    def exposed(self, cost: OpCost) -> OpCost:
        return cost.exposing(self.pricer.era.tensor_parallel_exposed)

    def reduction_s(self, num_bytes: float) -> float:
        return self.pricer.bucketed_s("all_reduce", num_bytes, self.pricer.groups[self.axis])
