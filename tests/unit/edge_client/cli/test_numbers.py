"""Numbers on the command line."""

import pytest
from click.testing import CliRunner

from edge_client.cli.main import main

OPTIONS = (
    "idle-timeout", "progress-timeout", "queue-timeout", "busy-timeout", "reattach-timeout", "silence-memory",
    "wait-for-server", "quality",
)  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_nan_is_in_no_range(option: str) -> None:
    """A cloud would be waited for without end, since no time is longer than it."""
    result = CliRunner().invoke(main, ["generate", "a fox", f"--{option}", "nan"])

    assert result.exit_code == 2
    assert f"Invalid value for '--{option}'" in result.output
    assert "nan is not in the range" in result.output
