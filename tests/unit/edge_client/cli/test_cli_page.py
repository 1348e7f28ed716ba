"""docs/cli.md is made from the programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import HANG_S

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.slow
def test_page_is_up_to_date() -> None:
    """The committed page is what the generator makes, whatever the width of the terminal."""
    command = [sys.executable, str(ROOT / "docs" / "generate_cli.py"), "--check"]
    environment = {**os.environ, "COLUMNS": "50"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False, env=environment)

    assert (done.returncode, done.stderr) == (0, "")
