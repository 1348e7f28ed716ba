"""Splitting a run over processes."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from training.checkpoints import load
from training.cli import main


@pytest.mark.timeout(120)
def test_two_processes_learn_together(tmp_path: Path) -> None:
    """A run over two processes ends, learns, and leaves one checkpoint of the whole."""
    result = CliRunner().invoke(main, ["vae", "--out", str(tmp_path), "--scale", "toy", "--workers", "2"])
    curve = load(tmp_path / "vae" / "checkpoint.pt")["curve"]

    assert result.exit_code == 0, result.output
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert (tmp_path / "vae" / "loss.png").stat().st_size > 1000
