"""What work costs on a machine: roofline, collectives, memory, pipeline schedules, and whole training steps.

Knows neither torch nor graphs: it is handed amounts of work (`Work`, `Collective`, `StageWork`) and machines
from `hardware_db`, and answers in seconds and bytes. Every machine's number comes from there.
"""

from __future__ import annotations

from costmodel.collectives import algorithms, collective_time_s
from costmodel.curves import Algorithm, MeasuredAlgorithm
from costmodel.errors import CostModelError
from costmodel.goodput import end_to_end_training_s, model_flops_utilization, scale_factor
from costmodel.memory import (
    Ledger,
    OptimizerPolicy,
    model_state_ledger,
    optimizer_policies,
    optimizer_policy,
    usual_policy,
)
from costmodel.offload import (
    HostUpdate,
    check_host,
    host_bytes_per_parameter,
    offloaded_update,
    on_device,
)
from costmodel.orders import (
    SCHEDULES,
    ScheduleName,
    peak_activation_bytes,
    peak_in_flight,
    rank_orders,
    rank_stages,
    stage_ranks,
)
from costmodel.parameter_server import (
    GradientExchange,
    ParameterServers,
    gradient_exchange,
    spread_servers_s,
)
from costmodel.roofline import Roofline, matmul_share, work_time_s
from costmodel.schedule import (
    Event,
    Timeline,
    closed_form_step_s,
    simulate,
)
from costmodel.software import Software, software, software_eras
from costmodel.steady import latest_finish_s, rank_finish_s
from costmodel.step import IDEAL_OVERLAP, TERMS, Overlap, StageWork, StepCost, step_cost
from costmodel.topology import Span, spans
from costmodel.work import Collective, CollectiveKind, Group, Work, WorkKind

__all__ = [
    "IDEAL_OVERLAP",
    "SCHEDULES",
    "TERMS",
    "Algorithm",
    "Collective",
    "CollectiveKind",
    "CostModelError",
    "Event",
    "GradientExchange",
    "Group",
    "HostUpdate",
    "Ledger",
    "MeasuredAlgorithm",
    "OptimizerPolicy",
    "Overlap",
    "ParameterServers",
    "Roofline",
    "ScheduleName",
    "Software",
    "Span",
    "StageWork",
    "StepCost",
    "Timeline",
    "Work",
    "WorkKind",
    "algorithms",
    "check_host",
    "closed_form_step_s",
    "collective_time_s",
    "end_to_end_training_s",
    "gradient_exchange",
    "host_bytes_per_parameter",
    "latest_finish_s",
    "matmul_share",
    "model_flops_utilization",
    "model_state_ledger",
    "offloaded_update",
    "on_device",
    "optimizer_policies",
    "optimizer_policy",
    "peak_activation_bytes",
    "peak_in_flight",
    "rank_finish_s",
    "rank_orders",
    "rank_stages",
    "scale_factor",
    "simulate",
    "software",
    "software_eras",
    "spans",
    "spread_servers_s",
    "stage_ranks",
    "step_cost",
    "usual_policy",
    "work_time_s",
]
