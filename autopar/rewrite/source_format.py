"""Emitted source as ruff formats it."""

from __future__ import annotations

import shutil
import subprocess
import sys


def format_source(text: str) -> str:
    """The text as ruff formats it; unchanged where ruff is not installed."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(_beside_python()))
    if ruff is None:
        return text
    command = [ruff, "format", "--isolated", "--line-length", "110", "--stdin-filename", "model.py", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the emitted source does not parse:\n{done.stderr}\n{text}"
    return done.stdout


def _beside_python() -> str:
    return sys.executable.rpartition("/")[0]
