"""What the engine holds for one of its devices: its executor, and what is in its hands."""

import queue
from contextlib import ExitStack
from dataclasses import dataclass

from cloud_server.energy import EnergyMeter, Measured
from cloud_server.engine.executor import Batch, Call, Executor, Launched
from cloud_server.engine.job import Job
from cloud_server.engine.step import Group

MAX_UNPUBLISHED = 64
"""Calls of jobs whose states wait to be copied off the device; beyond them its thread waits."""


@dataclass(frozen=True, eq=False, slots=True)
class Pending:
    """Calls that a device has been asked for and that are still to be accounted for."""

    launched: list[Launched]
    measured: Measured
    measuring: ExitStack
    """Closed when the device is done."""

    @property
    def calls(self) -> list[Call]:
        """Of each job."""
        return [call for launched in self.launched for call in launched.calls]


class DeviceWorker:
    """One device. Its step thread owns all but `unpublished`, and what is under the engine's lock."""

    def __init__(self, number: int, executor: Executor, energy: EnergyMeter, *, runs_ahead: bool | None = None) -> None:
        """Takes what runs on the device, and how energy is known there.

        Args:
            number: Of the device.
            executor: Runs its calls.
            energy: Of its work.
            runs_ahead: Whether it is asked for a call before it is done with the last; None: where it is a GPU, which
                would wait for Python otherwise.
        """
        self.number, self.executor, self.energy = number, executor, energy
        self.runs_ahead = executor.device.type == "cuda" if runs_ahead is None else runs_ahead
        self.unpublished: queue.Queue[tuple[Call, bool] | None] = queue.Queue(MAX_UNPUBLISHED)
        """Calls, and whether each was its job's last; None ends their thread."""
        self.pending: Pending | None = None
        self._done_s = 0.0
        # Under the engine's lock.
        self.in_hand: list[Job] = []
        """The jobs whose calls have not been accounted for."""
        self.since_s: float | None = None
        """Since when it has been at what it does; None while it waits for work."""
        self.is_dead = False

    def wait_published(self, timeout_s: float) -> None:
        """Waits until all that has come off the device is published, or no longer than this."""
        with self.unpublished.all_tasks_done:
            self.unpublished.all_tasks_done.wait_for(lambda: not self.unpublished.unfinished_tasks, timeout_s)

    def launch(self, batch: Batch, groups: set[Group]) -> Pending:
        """Asks for one call for a batch; see `Executor.call`."""
        with ExitStack() as measuring:
            measured = measuring.enter_context(self.energy.measure())
            return Pending(self.executor.call(batch, groups), measured, measuring.pop_all())

    def settle(self, pending: Pending) -> None:
        """Waits until the device is done with calls, and shares their energy among their jobs."""
        with pending.measuring:
            for launched in pending.launched:
                self._done_s = self.executor.settle(launched, self._done_s)
        calls = pending.calls
        group = calls[0].trajectory.group
        rows = [call.trajectory.num_rows for call in calls]
        energies = self.energy.of_call(pending.measured, group[0], group[1][1] * group[1][2], rows, calls[0].elapsed_s)
        for call, energy in zip(calls, energies, strict=True):
            if not isinstance(call.outcome, Exception):
                call.job.add_energy(energy)
