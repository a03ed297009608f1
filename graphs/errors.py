"""What can go wrong when a model becomes a graph.

GraphError(ValueError)
    CaptureError                 the model could not be captured
        DataDependentError       control flow or a shape depends on the values of a tensor
        UnsupportedOpError       an operator with no functional form, or one whose backward would be lost
"""

from __future__ import annotations

DATA_DEPENDENT_ADVICE = "replace the branch or the variable shape by torch.where, masking or a fixed size"


class GraphError(ValueError):
    """Base of every error that `graphs` raises for the user to mend."""


class CaptureError(GraphError):
    """The model could not be captured.

    Attributes:
        problem: what is wrong, in a sentence.
        module: path of the module whose forward was running, `""` for the root, None where unknown.
        source: the line of the model's own code, as `file:line: text`, None where unknown.
        advice: what to do about it.
    """

    def __init__(
        self, problem: str, *, module: str | None = None, source: str | None = None, advice: str = ""
    ) -> None:
        self.problem = problem
        self.module = module
        self.source = source
        self.advice = advice
        lines = [problem]
        if module is not None:
            lines.append(f"  in module: {module or '(the root module)'}")
        if source is not None:
            lines.append(f"  at: {source}")
        if advice:
            lines.append(f"  what to do: {advice}")
        super().__init__("\n".join(lines))


class DataDependentError(CaptureError):
    """Control flow, or the shape of a tensor, depends on the values of a tensor."""


class UnsupportedOpError(CaptureError):
    """An operator that cannot stand in an `OpGraph`."""
