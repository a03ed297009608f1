"""In which precision a program keeps what: read off the optimizer policy that its plan was priced with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autopar.errors import RewriteError
from costmodel import OptimizerPolicy

COPIES = frozenset({"master", "gradient"})
"""States of a policy that are no state of the optimizer."""
MOMENTS = frozenset({"exp_avg", "exp_avg_sq"})
"""The states of AdamW."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of training: parameters as products read them, what the optimizer updates, and gradients as
    they are added up and reduced."""

    compute: torch.dtype
    master: torch.dtype
    gradient: torch.dtype

    @property
    def has_master(self) -> bool:
        """Whether the optimizer updates something wider than what products read."""
        return self.master != self.compute

    @property
    def needs_loss_scale(self) -> bool:
        """Whether small gradients would vanish: fp16 has five bits of exponent (arXiv:1710.03740)."""
        return self.compute == torch.float16


def precision_of(policy: OptimizerPolicy, compute: torch.dtype) -> Precision:
    """How a model whose parameters are of dtype `compute` trains under a policy.

    A policy that keeps a master copy, or parameters wider than what is gathered of them, has the optimizer
    update those; a gradient of four bytes or more is single precision. Nothing is narrower than the model.

    Raises RewriteError for the policy of another optimizer than AdamW, and for one without master copies of a
    model in fp16, whose gradients are unscaled in single precision.
    """
    moments = set(dict(policy.state_bytes)) - COPIES
    if moments != MOMENTS:
        raise RewriteError(
            f"programs train with AdamW, which keeps {' and '.join(sorted(MOMENTS))} of a parameter; the "
            f"plan was priced with the policy {policy.name}, which keeps "
            f"{' and '.join(sorted(moments)) or 'neither'}: plan with one of AdamW's, such as adamw-mixed"
        )
    wide = torch.promote_types(compute, torch.float32)
    has_master = "master" in dict(policy.state_bytes) or policy.parameter_bytes > policy.gathered_bytes
    if compute == torch.float16 and not has_master:
        raise RewriteError(
            f"the plan was priced with the policy {policy.name}, which keeps no master copies of parameters "
            "in float16: what a step changes is mostly too small for it; plan with adamw-mixed, or train in "
            "bfloat16"
        )
    return Precision(
        compute=compute,
        master=wide if has_master else compute,
        gradient=wide if policy.gradient_bytes >= wide.itemsize else compute,
    )
