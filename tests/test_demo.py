"""The demo does what it shows: a plan, a program, and losses equal to the original's."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import demo


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a smaller model than the demo's own, which takes longer to plan."""
    monkeypatch.setattr(demo, "MODEL", "llama3-8b")
    monkeypatch.setattr(demo, "CLUSTER", "dgx-h100*2")
    monkeypatch.setattr(demo, "BUILD", tmp_path / "build" / "demo")
    assert demo.main() == 0
    output = capsys.readouterr().out
    assert "equal: the losses differ by at most" in output
    for file in ("full/launch.sh", "full/model.py", "small/train.py"):
        assert f"build/demo/{file}" in output
