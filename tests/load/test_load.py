"""A small part of `make load`, and what it computes with."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.figures import jain, percentile, slope, table
from tests.support.patience import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def test_percentiles_are_of_what_was_measured() -> None:
    """The smallest value that so many do not exceed."""
    values = [float(value) for value in range(1, 101)]

    assert [percentile(values, part) for part in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert math.isnan(percentile([], 0.5))


def test_jain_is_one_where_all_are_equal() -> None:
    """And 1/n where one has all; nobody served is no fairness."""
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert math.isnan(jain([0.0, 0.0]))


def test_a_slope_is_that_of_the_line() -> None:
    """Of noise around a line, and 0 of one sample."""
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 1.0)]) == 0.0


def test_a_table_has_the_columns_that_rows_have() -> None:
    """Others are left out."""
    assert table(("a", "b", "c"), [{"a": "1"}, {"a": "2", "c": "x"}]) == "| a | c |\n| --- | --- |\n| 1 |  |\n| 2 | x |"


@pytest.mark.slow
def test_the_bench_runs() -> None:
    """With tiny models and for seconds: what it starts, it ends, and it says where it ran and what came of it.

    Whether its promises hold is for `make load` on a quiet machine: most are about time.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.load.run", "contention", "two-clouds", "prediction", "--quick"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=HANG_S
    )

    is_kept = done.stdout.rstrip().endswith("every promise was kept")
    assert done.returncode == (0 if is_kept else 1), done.stdout + done.stderr[-3000:]
    assert is_kept or "BROKEN: " in done.stdout
    assert done.stdout.startswith("machine: ")
    assert "12 jobs against 1" in done.stdout
    assert "2 clouds, 1 killed" in done.stdout
    assert "3 clients, predicted" in done.stdout
