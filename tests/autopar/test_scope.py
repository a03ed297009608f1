"""Statements and the source they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar.rewrite.expressions import SUM, Expression
from autopar.rewrite.naming import fresh
from autopar.rewrite.scope import FOLD_WEIGHT, Scope, Statement


def call(target: str, reads: Sequence[str], function: str, base: str = "x", **more: Any) -> Statement:
    """`target = function(reads)`."""
    return Statement(
        (target,),
        tuple(reads),
        lambda values: Expression(f"{function}({', '.join(values[name].text for name in reads)})"),
        (base,),
        **more,
    )


def add(target: str, left: str, right: str) -> Statement:
    return Statement(
        (target,),
        (left, right),
        lambda values: Expression(f"{values[left].text} + {values[right].text}", SUM),
        ("x",),
    )


def lines(*statements: Statement, results: tuple[str, ...], arguments: Sequence[str] = ("x",)) -> list[str]:
    scope = Scope({name: name for name in arguments}, {}, results)
    scope.statements.extend(statements)
    return scope.lines()


def test_a_value_that_is_read_once_is_written_where_it_is_read() -> None:
    body = (call("n", ["x"], "self.norm"), call("m", ["n"], "self.mlp"), add("y", "x", "m"))
    assert lines(*body, results=("y",)) == ["x = x + self.mlp(self.norm(x))", "return x"]


def test_a_value_that_is_read_twice_is_a_variable() -> None:
    body = (call("h", ["x"], "f", base="hidden"), add("y", "h", "h"))
    assert lines(*body, results=("y",)) == ["hidden = f(x)", "return hidden + hidden"]


def test_a_name_is_used_again_once_its_value_is_past() -> None:
    body = (call("a", ["x"], "f", foldable=False), call("b", ["a"], "g", foldable=False), add("y", "b", "b"))
    assert lines(*body, results=("y",)) == ["x = f(x)", "x = g(x)", "return x + x"]


def test_a_value_that_is_still_needed_keeps_its_name() -> None:
    body = (call("a", ["x"], "f", foldable=False), add("y", "x", "a"))
    assert lines(*body, results=("y",)) == ["x_2 = f(x)", "return x + x_2"]


def test_no_expression_holds_more_than_a_reader_can() -> None:
    body = [
        call(str(index), [str(index - 1) if index else "x"], f"f{index}") for index in range(FOLD_WEIGHT + 1)
    ]
    written = lines(*body, results=(str(FOLD_WEIGHT),))
    assert written == ["x = f4(f3(f2(f1(f0(x)))))", "return f5(x)"]


def test_a_comment_stands_behind_its_line_or_before_a_long_one() -> None:
    short = call("a", ["x"], "f", comment="tp: P -> R")
    assert lines(short, results=("a",)) == ["x = f(x)  # tp: P -> R", "return x"]
    long = call("a", ["x"], "f" * 95, comment="tp: P -> R")
    assert lines(long, results=("a",))[0] == "# tp: P -> R"


def test_a_loop_carries_a_variable_of_its_own_where_the_value_before_it_is_read_again() -> None:
    loop = call(
        "z", ["x"], "layer", loop="for layer in self.layers:", carried="x", foldable=False, absorbs=False
    )
    assert lines(loop, results=("z",)) == ["for layer in self.layers:", "    x = layer(x)", "return x"]
    again = lines(loop, add("y", "x", "z"), results=("y",))
    body = ["x_2 = x", "for layer in self.layers:", "    x_2 = layer(x_2)", "x = x + x_2", "return x"]
    assert again == body


def test_names_hide_no_keyword_and_no_builtin() -> None:
    assert fresh("lambda", ()) == "lambda_"
    assert fresh("abs", ()) == "abs_"
    assert fresh("x", {"x", "x_2"}) == "x_3"
