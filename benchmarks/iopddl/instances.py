"""Instances of our own in the contest's format: random ones, and our operator layer's problems put in pairs.

python -m benchmarks.iopddl.instances        writes benchmarks/data/iopddl/*.json, and what is proven of them
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hardware_db
from autopar import models
from autopar.placements import RR, State
from autopar.pricing import Pricer
from autopar.search.axis_prices import ClusterPrices
from autopar.search.axis_problem import AxisProblem, TensorClass
from autopar.search.shallow import local_counts, shallow
from benchmarks.iopddl.problem import FORBIDDEN, Edge, Node, Problem, write
from benchmarks.iopddl.program import solve_problem
from costmodel import Group
from graphs import capture

DIRECTORY = Path(__file__).parents[1] / "data" / "iopddl"
PROVEN = "proven.json"
NEVER = FORBIDDEN * 1000
NS_PER_S, BYTES_PER_MIB = 1e9, 2**20


def of_axis_problem(name: str, axis: AxisProblem) -> Problem:
    """The operator layer's problem in pairs: costs in nanoseconds, usages in MiB of saved activations and of
    parameters, live from their op to its backward.

    Unlike in the operator layer, every reader of a tensor pays for its own conversion.
    """
    position = {index: place for place, index in enumerate(axis.instances)}
    end = 2 * len(position)
    nodes = [
        Node(
            place,
            end - place,
            tuple(round(NS_PER_S * time_s) for time_s in axis.op_times_s[index]),
            tuple(round(num_bytes / BYTES_PER_MIB) for num_bytes in axis.saved_bytes[index]),
        )
        for index, place in position.items()
    ]
    edges = []
    for tensors in axis.tensor_classes:
        if tensors.producer is None:
            states = axis.stored_states(tensors) if tensors in axis.parameter_classes else (RR,)
            source = len(nodes)
            nodes.append(_source(axis, tensors, states, end))
        else:
            op, result = tensors.producer
            source, states = position[op], tuple(strategy.results[result] for strategy in axis.offered[op])
        for reader in tensors.readers:
            asked = [strategy.operands[reader.position] for strategy in axis.offered[reader.op]]
            prices = [axis.conversion_s(tensors.name, made, want) for made in states for want in asked]
            costs = tuple(NEVER if s is None else round(NS_PER_S * tensors.count * s) for s in prices)
            edges.append(Edge(source, position[reader.op], costs))
    return Problem(name, tuple(nodes), tuple(edges), None)


def _source(axis: AxisProblem, tensors: TensorClass, states: tuple[State, ...], end: int) -> Node:
    """What the graph starts from: parameters by how they are stored, and inputs, which are whole."""
    mib = tensors.count * axis.graph.tensors[tensors.name].num_bytes / BYTES_PER_MIB
    costs = (round(NS_PER_S * tensors.count * axis.reduction_s(tensors.name, state)) for state in states)
    is_kept = tensors in axis.parameter_classes
    usages = (round(mib / axis.parts(state)) if is_kept else 0 for state in states)
    return Node(0, end, tuple(costs), tuple(usages))


def layered(name: str, seed: int, num_layers: int, width: int, tightness: float) -> Problem:
    """A random net: layers of nodes with some edges to the layer before and skips further back, states that
    strategies read and write, and a price for every change of state; cheap strategies take more memory."""
    rng = random.Random(seed)
    num_states = 4
    change = [[0 if a == b else rng.randint(20, 400) for b in range(num_states)] for a in range(num_states)]
    nodes, made, edges = [], [], []
    for layer in range(num_layers):
        for _ in range(width):
            strategies = range(rng.randint(2, 4))
            costs = [rng.randint(10, 500) for _ in strategies]
            usages = tuple(round(3000 / (cost + 30)) + rng.randint(0, 9) for cost in costs)
            nodes.append(Node(layer, min(num_layers, layer + rng.randint(1, 3)), tuple(costs), usages))
            made.append([rng.randrange(num_states) for _ in strategies])
    for reader in range(width, len(nodes)):
        layer = reader // width
        sources = {(layer - 1) * width + rng.randrange(width), rng.randrange(layer * width)}
        for source in sorted(sources):
            pairs = [change[a][b] for a in made[source] for b in made[reader]]
            costs_of_pairs = tuple(NEVER if rng.random() < 0.02 else cost for cost in pairs)
            edges.append(Edge(source, reader, costs_of_pairs))
    return tightened(Problem(name, tuple(nodes), tuple(edges), None), tightness)


def tightened(problem: Problem, tightness: float) -> Problem:
    """With a limit between the least (1) and the most (0) memory that the nodes can take together."""
    peaks = [
        max(
            sum(choose(node.usages) for node in problem.nodes if node.start <= time < node.end)
            for time in {node.start for node in problem.nodes}
        )
        for choose in (min, max)
    ]
    least, most = peaks
    return replace(problem, usage_limit=round(least + (1 - tightness) * (most - least)))


def axis_problem(model: str, size: int, batch: int = 1) -> AxisProblem:
    """The operator layer's problem of a published model on a tensor axis, on nodes of eight H100."""
    spec = models.load(model)
    short = shallow(capture(spec.build_without_memory(), spec.inputs, name=model))
    graph = short.capture.at(batch)
    pricer = Pricer(hardware_db.cluster("dgx-h100"), {"tp": Group(size, 1), "dp": Group(1, size)})
    counts = local_counts(graph.ops, short.counts)
    return AxisProblem(graph, "tp", size, ClusterPrices(pricer, "tp"), counts)


def instances() -> Iterator[Problem]:
    """All that are kept in the repository."""
    yield layered("layers-4x2", seed=1, num_layers=4, width=2, tightness=0.6)
    yield layered("layers-12x3", seed=2, num_layers=12, width=3, tightness=0.5)
    yield layered("layers-30x4", seed=3, num_layers=30, width=4, tightness=0.7)
    gpt2 = of_axis_problem("gpt2-tp4", axis_problem("gpt2", 4))
    yield gpt2
    yield replace(tightened(gpt2, 0.97), name="gpt2-tp4-tight")
    llama = of_axis_problem("llama3-8b-tp8", axis_problem("llama3-8b", 8))
    yield replace(tightened(llama, 0.97), name="llama3-8b-tp8-tight")


def main() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    proven = {}
    for problem in instances():
        write(problem, DIRECTORY / f"{problem.name}.json")
        result = solve_problem(problem, relative_gap=1e-9)
        print(problem.name, result)
        proven[problem.name] = {
            "bound": result.bound,
            "incumbent": result.incumbent,
            "first_incumbent": result.first_incumbent,
        }
    (DIRECTORY / PROVEN).write_text(json.dumps(proven, indent=2) + "\n")


if __name__ == "__main__":
    main()
