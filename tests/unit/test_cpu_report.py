"""`pytest --cpu-report` counts what tests start, too."""

import subprocess
import sys

from tests.support.cpu_report import cpu_seconds

BURN = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\nsys.stdin.read()"


def test_processes_are_counted_while_they_run_and_when_they_have_ended() -> None:
    """By what they have used; waiting costs nothing."""
    begin = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        running = cpu_seconds() - begin
        process.communicate()
    ended = cpu_seconds() - begin

    assert running >= 0.28  # the kernel tells of others in hundredths
    assert ended >= running - 0.02
