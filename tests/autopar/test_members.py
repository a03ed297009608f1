"""Members of an emitted class: containers, numbered layers, modules that are both leaf and container."""

from __future__ import annotations

from autopar.rewrite.members import _build, _tree


def lines(constructors: dict[str, str]) -> list[str]:
    return list(_build("self", _tree(constructors), ()))


def test_a_module_with_parameters_of_its_own_and_modules_inside_keeps_both() -> None:
    inside_first = {"gate.norm": "Norm()", "gate": "Parameters(scale=(4,))"}
    expected = ["self.gate = Parameters(scale=(4,))", "self.gate.norm = Norm()"]
    assert lines(inside_first) == lines(dict(reversed(inside_first.items()))) == expected


def test_equal_layers_are_one_comprehension() -> None:
    layers = {f"model.layers.{number}": "Layer(mesh)" for number in range(3)}
    assert lines(layers) == [
        "self.model = Container()",
        "self.model.layers = Container({str(i): Layer(mesh) for i in range(3)})",
    ]
