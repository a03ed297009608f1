"""Optimizer states in the host's memory: what stays on the device, what moves, and what the update takes.

After ZeRO-Offload (arXiv:2101.06840, sections 4 and 5). A device keeps parameters as products read them and
gradients; its host keeps the master copy, the optimizer's states and the gradients that arrived. With n
parameters that a device is to update, g bytes of a gradient, c of a parameter as products read it, u that an
update reads and writes for one, a link of L bytes/s in each direction and host memory of M bytes/s for this
device, of which an update reaches the share e,

    down    n g / L          gradients, behind the backward that makes them, as far as that lasts
    update  n u / (e M)
    up      n c / L          updated parameters, tile by tile behind the update

so a step takes max(0, down - backward) + max(update, up) longer. L and M are what is left of them while all
devices of a host do the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from costmodel.errors import CostModelError
from costmodel.memory import OptimizerPolicy

if TYPE_CHECKING:
    from hardware_db import Cluster

__all__ = [
    "HostShare",
    "HostUpdate",
    "check_host",
    "host_bytes_per_parameter",
    "offloaded_update",
    "on_device",
]


@dataclass(frozen=True, slots=True)
class HostUpdate:
    """Seconds of one update by the host: gradients down, the update itself, parameters up."""

    down_s: float
    update_s: float
    up_s: float

    def exposed_s(self, behind_s: float = 0.0) -> float:
        """What it adds to a step in which gradients can move behind `behind_s` of computing."""
        return max(0.0, self.down_s - behind_s) + max(self.update_s, self.up_s)


def on_device(policy: OptimizerPolicy) -> OptimizerPolicy:
    """What is left of a policy on the device: parameters as products read them, and gradients."""
    return replace(policy, parameter_bytes=policy.gathered_bytes, state_bytes=())


def host_bytes_per_parameter(policy: OptimizerPolicy) -> float:
    """Bytes of host memory for each parameter that a device updates: a copy to update (the master copy, where
    the policy has one), the optimizer's states and the gradient."""
    return _states_bytes(policy) + policy.gradient_bytes


def offloaded_update(num_parameters: float, policy: OptimizerPolicy, cluster: Cluster) -> HostUpdate:
    """The update of the `num_parameters` of one device, while all devices of its host do as much.

    Raises CostModelError where the cluster's data do not say how fast the host is.
    """
    host = check_host(cluster)
    narrowed_bytes = 0.0 if policy.gathered_bytes == _copy_bytes(policy) else policy.gathered_bytes
    update_bytes = 2 * _states_bytes(policy) + policy.gradient_bytes + narrowed_bytes
    return HostUpdate(
        down_s=num_parameters * policy.gradient_bytes / host.link_bytes_per_s,
        update_s=num_parameters * update_bytes / (_update_share() * host.memory_bytes_per_s),
        up_s=num_parameters * policy.gathered_bytes / host.link_bytes_per_s,
    )


class HostShare(NamedTuple):
    """A device's part of its host while all devices of the host take theirs: the link in each direction, what
    moves from and to memory, and the memory itself."""

    link_bytes_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float


def check_host(cluster: Cluster) -> HostShare:
    """What the cluster's data say of a device's part of its host.

    Raises CostModelError, naming what is missing, where they do not say all of it.
    """
    fields = [f"host_{name}_per_device" for name in HostShare._fields]
    values = [getattr(cluster, field) for field in fields]
    if None in values:
        missing = ", ".join(field for field, value in zip(fields, values, strict=True) if value is None)
        raise CostModelError(
            f"optimizer states cannot be offloaded on {cluster.name!r}, as nothing is known of {missing}; "
            "give that in a cluster file of your own, or use offload='none'"
        )
    return HostShare(*values)


def _states_bytes(policy: OptimizerPolicy) -> float:
    """What an update reads and writes again."""
    has_master = "master" in dict(policy.state_bytes)
    return policy.optimizer_bytes + (0.0 if has_master else policy.parameter_bytes)


def _copy_bytes(policy: OptimizerPolicy) -> float:
    return dict(policy.state_bytes).get("master", policy.parameter_bytes)


@cache
def _update_share() -> float:
    text = files("costmodel").joinpath("data/offload.json").read_text(encoding="utf-8")
    share: float = json.loads(text)["host_update_share"]["value"]
    return share
