"""What an op may do on an axis, and the conversions between states."""

from __future__ import annotations

import itertools

import pytest

from autopar.placements import PR, RP, RR, Shard, State, sharded
from autopar.strategies import Strategy, conversion, natural_sections, stored_state, strategies
from graphs import OpGraph
from tests.autopar.double_captures import captured
from tests.autopar.graph_builder import GraphBuilder

STATES = (RR, RP, PR, sharded(0), sharded(1))


def offered(graph: OpGraph, index: int, size: int = 2) -> dict[str, Strategy]:
    return {
        each.key: each for each in strategies(graph.ops[index], graph, size, natural_sections(graph, size))
    }


@pytest.fixture
def linear() -> OpGraph:
    """Two linear layers, so that the second one's input has a gradient."""
    make = GraphBuilder()
    return make.graph(make.sum(make.linear(make.linear(make.input(2, 6, 8), 8), 4)))


def test_a_linear_layer_is_split_by_columns_by_rows_or_by_its_batch(linear: OpGraph) -> None:
    found = offered(linear, 1)
    assert (found["o"].operands, found["o"].results) == ((RP, sharded(0)), (sharded(2),))
    assert (found["h"].operands, found["h"].results) == ((sharded(2), sharded(1)), (PR,))
    assert (found["d0"].operands, found["d0"].results) == ((sharded(0), RP), (sharded(0),))


def test_replication_comes_first_and_divides_no_work(linear: OpGraph) -> None:
    first = strategies(linear.ops[1], linear, 2, {})[0]
    assert (first.key, first.operands, first.results, first.factor) == ("replicate", (RR, RR), (RR,), None)


def test_a_dimension_is_split_only_where_it_divides(linear: OpGraph) -> None:
    assert "d1" not in offered(linear, 1, size=4)  # 6 rows
    assert "o" in offered(linear, 1, size=4)
    assert "o" not in offered(linear, 1, size=8)  # 4 columns


def test_an_operand_without_gradient_has_no_partial_one(linear: OpGraph) -> None:
    assert offered(linear, 0)["o"].operands == (RR, sharded(0))


def test_the_loss_is_whole_or_partial_with_a_whole_gradient(linear: OpGraph) -> None:
    results = {each.results for each in offered(linear, 2).values()}
    assert results == {(RR,), (PR,)}


def test_a_tensor_that_stands_twice_is_in_one_state() -> None:
    make = GraphBuilder()
    x = make.linear(make.input(4, 8), 8)
    graph = make.graph(make.sum(make.mul(x, x)))
    assert all(len(set(each.operands)) == 1 for each in offered(graph, 1).values())


def test_a_fused_projection_learns_of_the_sections_that_are_cut_later() -> None:
    capture, _, _ = captured("gpt2")
    graph = capture.at(2)
    assert (64, 64, 64) in natural_sections(graph, 2)[192]
    index = next(i for i, op in enumerate(graph.ops) if graph.tensors[op.outputs[0]].shape[-1:] == (192,))
    keys = offered(graph, index)
    cut = next(each for key, each in keys.items() if key.endswith("|64,64,64"))
    assert cut.results[0].value == Shard(
        2 if len(graph.tensors[graph.ops[index].output].shape) == 3 else 1, (64,) * 3
    )


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)), ids=str)
def test_a_conversion_backwards_moves_what_the_gradients_states_ask(before: State, after: State) -> None:
    """The backward of a change of state is the change of the gradient from `after.grad` to `before.grad`."""
    how = conversion(before, after, requires_grad=True)
    if how is None or before == after:
        return
    moves = {
        ("Shard", "Replicate"): "all_gather", ("Partial", "Replicate"): "all_reduce",
        ("Partial", "Shard"): "reduce_scatter", ("Shard", "Shard"): "all_to_all",
    }  # fmt: skip

    def move(source: object, target: object) -> str | None:
        return moves.get((type(source).__name__, type(target).__name__))

    assert how.forward == move(before.value, after.value)
    assert how.backward == move(after.grad, before.grad)
    still = conversion(before, after, requires_grad=False)
    assert still is not None
    assert (still.forward, still.backward) == (how.forward, None)


def test_a_parameter_is_stored_as_all_its_consumers_want_it() -> None:
    assert stored_state([sharded(0), sharded(0)]) == sharded(0)
    assert stored_state([sharded(0), sharded(1)]) == RR
    assert stored_state([sharded(0), RP]) == RP
    assert stored_state([]) == RR
