"""How many instructions this process executes: unlike its seconds, the same on a busy machine."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_ATTRIBUTE = "IIQQQQQ"
_ATTRIBUTE_BYTES = 112
_INSTRUCTIONS = 1
_FLAGS = 1 << 1 | 1 << 5 | 1 << 6
"""With threads started later; without the kernel and the hypervisor, which all may count."""


class Instructions:
    """A counter of the calling thread and those that it starts, from its making on (perf_event_open(2));
    `count` is None where the system has none or forbids it."""

    def __init__(self) -> None:
        number = _PERF_EVENT_OPEN.get(platform.machine()) if platform.system() == "Linux" else None
        self._file = -1
        if number is not None:
            attribute = struct.pack(_ATTRIBUTE, 0, _ATTRIBUTE_BYTES, _INSTRUCTIONS, 0, 0, 0, _FLAGS)
            buffer = ctypes.create_string_buffer(attribute, _ATTRIBUTE_BYTES)
            self._file = ctypes.CDLL(None).syscall(number, buffer, 0, -1, -1, 0)

    @property
    def count(self) -> int | None:
        """Instructions so far."""
        if self._file < 0:
            return None
        (number,) = struct.unpack("Q", os.read(self._file, 8))
        return int(number)
