"""Which device this is, as the library reports it and as the catalog knows it, and what runs on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import hardware_db
from autopar.errors import AutoparError
from hardware_db.errors import did_you_mean
from hardware_db.profile import reported_names

DEVICE_TYPES = ("cuda", "cpu")


def device_of(device_type: str | None) -> torch.device:
    """The device of this process: under torchrun that of its local rank. None asks for the best there is.

    Raises AutoparError where there is none of the type.
    """
    has_cuda = torch.cuda.is_available()
    device_type = device_type or ("cuda" if has_cuda else "cpu")
    if device_type not in DEVICE_TYPES:
        raise AutoparError(
            f"unknown device {device_type!r}{did_you_mean(device_type, DEVICE_TYPES)}; give cuda or cpu"
        )
    if device_type == "cpu":
        return torch.device("cpu")
    if not has_cuda:
        raise AutoparError(f"torch {torch.__version__} sees no CUDA device here; calibrate --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def name_of(device: torch.device) -> str:
    """The device's name as the library or the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() or platform.processor() or platform.machine()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def memory_bytes_of(device: torch.device) -> int:
    """Memory of the device; of a CPU, the share of one process of this host."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def accelerator_named(id: str | None, device: torch.device) -> str | None:
    """The catalog's id of the accelerator that the user names, else of the one whose reported name it lists.

    Raises UnknownHardwareError for a name that the catalog lacks.
    """
    if id is not None:
        return hardware_db.accelerator(id).id
    return reported_names().get(name_of(device))


def software_of(device: torch.device) -> dict[str, str]:
    """Versions of what the measurements depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda or torch.version.hip or "unknown"
        versions["cudnn"] = str(torch.backends.cudnn.version())
        if torch.distributed.is_nccl_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions
