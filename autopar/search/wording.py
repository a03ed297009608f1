"""Bytes and seconds in the words of messages."""

from __future__ import annotations

GB, MB = 1e9, 1e6


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / MB:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds >= 0.1:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.2g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.2g} us"
