"""`make load`: real processes under many clients. Prints a table; fails where a promise is broken.

    python -m tests.load.run [SCENARIO...] [--quick] [--tiny] [--plain-tokens]

Everything listens on the loopback, has an end, and is ended. Without a scenario it runs all of them, for about a
quarter of an hour. It is a bench: tests/load/test_load.py runs a small part of it.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from tests.benchmarks.common import machine, say
from tests.load.figures import table
from tests.load.scenarios import COLUMNS, FULL, QUICK, SCENARIOS
from tests.load.servers import place


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for. Returns the exit status: 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description="Real processes under many clients.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny models and seconds: its numbers say nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny models: what the servers cost without their models")
    parser.add_argument("--plain-tokens", action="store_true", help="a token file without names, for older clouds")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.scenarios) - set(SCENARIOS))
    if unknown:
        parser.error(f"unknown {unknown}; choose from {', '.join(SCENARIOS)}")
    scale = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    say(f"machine: {machine()}\n")
    rows, broken = [], []
    for name in options.scenarios or SCENARIOS:
        with place(tiny=options.quick or options.tiny, plain_tokens=options.plain_tokens) as here:
            report = SCENARIOS[name](here, scale)
        say(table(COLUMNS, report.rows) + "\n")
        rows += report.rows
        broken += report.broken
    say("## All\n\n" + table(COLUMNS, rows) + "\n")
    say("\n".join(f"BROKEN: {promise}" for promise in broken) or "every promise was kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
