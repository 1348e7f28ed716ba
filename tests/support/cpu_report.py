"""`pytest --cpu-report`: the CPU seconds of each test and fixture, their child processes' included.

On a busy machine a wall clock measures the neighbours. CPU seconds, of all threads and processes that a test starts,
are what the suite costs wherever it runs.
"""

import os
import resource
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PARTS = ("collecting", "fixtures", "tests")


def add_option(parser: pytest.Parser) -> None:
    """Adds the option to pytest's."""
    parser.addoption(
        "--cpu-report", type=int, nargs="?", const=60, metavar="N",
        help="account CPU seconds of tests and fixtures with their processes; print the N largest (default 60)",
    )  # fmt: skip


def configure(config: pytest.Config) -> None:
    """Begins to account, if asked to. With xdist workers measure, and the controller adds up and prints."""
    largest = config.getoption("--cpu-report", default=None)
    if largest is not None:
        config.pluginmanager.register(CpuReport(config, largest), "cpu-report")


def cpu_seconds() -> float:
    """Returns what this process has used, and all that it started: those that run, and the ended ones it waited for.

    A process whose parent has left it to init is not found.
    """
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    running = sum(_of_process(pid) for pid in _descendants("self"))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + running


def _descendants(pid: int | str) -> Iterator[int]:
    """Yields the running processes below one."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(word) for word in children.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in below:
            yield child
            yield from _descendants(child)


def _of_process(pid: int) -> float:
    """Returns what a process and its ended children have used; 0 if it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) * _TICK_S  # utime, stime, cutime, cstime


class CpuReport:
    """Measures between pytest's hooks. What a fixture or a module's import uses is its own, and no test's."""

    def __init__(self, config: pytest.Config, largest: int) -> None:
        self._config = config
        self._largest = largest
        self._spent: dict[str, Counter[str]] = defaultdict(Counter)
        """CPU seconds by part and name."""
        self._times: Counter[str] = Counter()
        """How often a fixture was set up."""
        self._workers: dict[str, float] = {}
        """The whole CPU seconds of each process that ran tests, its own start included."""
        self._inner = [0.0]
        """What was measured inside the measurements that are under way, the innermost last."""

    @contextmanager
    def _measured(self, part: str, name: str) -> Iterator[None]:
        begin = cpu_seconds()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = cpu_seconds() - begin
            self._spent[part][name] += whole - self._inner.pop()
            self._inner[-1] += whole

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[Any]:
        with self._measured("collecting", collector.nodeid or "."):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        name = f"{fixturedef.baseid}::{fixturedef.argname} ({fixturedef.scope})"
        self._times[name] += 1
        with self._measured("fixtures", name):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        with self._measured("tests", item.nodeid):
            return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output["cpu_report"] = (cpu_seconds(), dict(self._times), {p: dict(c) for p, c in self._spent.items()})

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Adds what a worker measured (a hook of xdist); one that crashed says nothing."""
        whole, times, spent = getattr(node, "workeroutput", {}).get("cpu_report", (0.0, {}, {}))
        self._workers[node.gateway.id] = whole
        self._times.update(times)
        for part, names in spent.items():
            self._spent[part].update(names)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints the largest, by test, by file and by fixture."""
        write = terminalreporter.write_line
        files: Counter[str] = Counter()
        for name, cpu_s in self._spent["tests"].items():
            files[name.partition("::")[0]] += cpu_s
        for part, spent in (*((part, self._spent[part]) for part in _PARTS), ("tests, by file", files)):
            terminalreporter.section(f"CPU seconds: {part}, {sum(spent.values()):.1f} in all", "-")
            for name, cpu_s in spent.most_common(self._largest):
                times = self._times[name] if part == "fixtures" else 1
                write(f"{cpu_s:8.2f}  {name}" + (f" x {times}" if times > 1 else ""))
        self._workers["all"] = cpu_seconds()
        write("CPU seconds, " + ", ".join(f"{name}: {cpu_s:.1f}" for name, cpu_s in self._workers.items()))
