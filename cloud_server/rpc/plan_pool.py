"""Plans for many callers: those at hand at once, each new one compiled once, and only so many at a time.

Knows nothing of messages but the names of their fields.
"""

import asyncio

from cloud_server.metrics import Metrics
from cloud_server.models.load import Description
from cloud_server.models.plans import PlanCompiler
from cloud_server.rpc.worker_pool import WorkerPool
from hybridsd.errors import HybridSDError, Reason
from hybridsd.plan import Plan

QUICK_STEPS = 100
"""Plans of more steps, which take up to 15 s, have a thread of their own."""
MAX_COMPILING = 8
"""Plans that may wait for either thread."""
STALL_RETRY_S = 5.0
"""When to come again while a plan takes too long; once it is there, it is kept."""

_FIELDS = {Reason.SCHEDULER_UNKNOWN: "scheduler.name", Reason.STEPS_INVALID: "scheduler.num_inference_steps"}

Key = tuple[PlanCompiler, str, int, int]
Compiled = tuple[Plan, bytes]


class PlanPool:
    """Compiles plans off the event loop."""

    def __init__(self, *, stall_timeout_s: float, metrics: Metrics) -> None:
        """Takes how long a plan may take; after more nobody waits for it, nor for those behind it."""
        self._stall_timeout_s, self._metrics = stall_timeout_s, metrics
        self._quick = WorkerPool("plans", 1, max_waiting=MAX_COMPILING)
        self._slow = WorkerPool("long plans", 1, max_waiting=MAX_COMPILING)
        self._running: dict[Key, tuple[asyncio.Task[Compiled], list[object]]] = {}

    def close(self) -> None:
        """Ends what is being compiled with UNAVAILABLE."""
        self._quick.close()
        self._slow.close()

    async def plan(self, model: Description, scheduler: str, num_inference_steps: int, begin_step: int) -> Compiled:
        """Returns a plan of a model and its digest: at once if it was compiled before.

        Raises:
            HybridSDError: What `PlanCompiler.plan` raises, naming the field; QUEUE_FULL with a retry delay where too
                many wait, UNAVAILABLE with one where a plan does not come.
        """
        try:
            held = model.plans.held_with_digest(scheduler, num_inference_steps, begin_step)
            self._metrics.note_lookup("plans", is_hit=held is not None)
            return held or await self._compiled(model, scheduler, num_inference_steps, begin_step)
        except HybridSDError as error:
            if error.field is None:
                raise
            field = "scheduler.begin_step" if error.field == "begin_step" else _FIELDS.get(error.reason, "scheduler")
            raise error.reason.error(error.message, field=field) from error

    async def _compiled(
        self, model: Description, scheduler: str, num_inference_steps: int, begin_step: int
    ) -> Compiled:
        """Waits for a plan that is being compiled; when the last who waits leaves, it need not be begun."""
        key = (model.plans, scheduler, num_inference_steps, begin_step)
        pool = self._quick if num_inference_steps <= QUICK_STEPS else self._slow
        self._check_stall(pool)
        if key not in self._running:
            compiling = pool.run(model.plans.with_digest, scheduler, num_inference_steps, begin_step)
            task = asyncio.create_task(compiling)
            task.add_done_callback(lambda done: self._forget(key, done))
            self._running[key] = (task, [])
        task, waiting = self._running[key]
        ticket = object()
        waiting.append(ticket)
        try:
            while not (await asyncio.wait({task}, timeout=self._stall_timeout_s / 4))[0]:
                self._check_stall(pool)
            return await asyncio.shield(task)
        finally:
            waiting.remove(ticket)
            if not waiting and not task.done():
                task.cancel()
                self._forget(key, task)

    def _check_stall(self, pool: WorkerPool) -> None:
        if (stalled_s := pool.stalled_s) >= self._stall_timeout_s:
            raise Reason.UNAVAILABLE.error(
                f"a plan has not been compiled for {stalled_s:.0f} s; choose another scheduler or number of steps, or"
                " come again",
                retry_delay_s=STALL_RETRY_S,
            )

    def _forget(self, key: Key, task: "asyncio.Task[Compiled]") -> None:
        if key in self._running and self._running[key][0] is task:
            del self._running[key]
        if task.done() and not task.cancelled():
            task.exception()  # whoever waited for it has it
