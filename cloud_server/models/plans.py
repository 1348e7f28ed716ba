"""Plans of the schedulers that we know by name, compiled from diffusers once and kept.

Compiling is safe from several threads and takes 10 ms to some seconds: call it off the event loop. Knows nothing
of jobs.
"""

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import structlog
import torch

from hybridsd import schedulers
from hybridsd.errors import HybridSDError
from hybridsd.plan import Plan
from hybridsd.plan_compiler import compile_named

log = structlog.get_logger()

MAX_PLANS = 256
MAX_ROWS = 50_000
"""Of all plans that a model keeps: some 50 MB."""


class PlanCompiler:
    """Compiles the plans of one model's schedulers."""

    def __init__(self, base_config: Mapping[str, Any], *, max_plans: int = MAX_PLANS) -> None:
        """Takes the content of the model's `scheduler_config.json`."""
        self._base_config, self._max_plans = dict(base_config), max_plans
        self._plans: OrderedDict[tuple[str, int, int], tuple[Plan, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanCompiler, (self._base_config,)  # for another process, without the plans

    def plan(self, scheduler: str, num_inference_steps: int, begin_step: int = 0) -> Plan:
        """Returns the plan of a scheduler, by any of its names; see `compile_plan`.

        Raises:
            InvalidRequest: SCHEDULER_UNKNOWN, SCHEDULER_NOT_AFFINE or STEPS_INVALID.
        """
        return self.with_digest(scheduler, num_inference_steps, begin_step)[0]

    def with_digest(self, scheduler: str, num_inference_steps: int, begin_step: int = 0) -> tuple[Plan, bytes]:
        """Returns the plan of a scheduler and its digest; see `plan`."""
        spec = schedulers.find(scheduler)
        held = self.held_with_digest(scheduler, num_inference_steps, begin_step)
        if held is not None:
            return held
        plan = self._compile(spec, num_inference_steps, begin_step)
        with self._lock:
            found = self._plans[spec.name, num_inference_steps, begin_step] = plan, plan.digest()
            num_rows = sum(len(held.rows) for held, _ in self._plans.values())
            while len(self._plans) > 1 and (len(self._plans) > self._max_plans or num_rows > MAX_ROWS):
                _, (oldest, _) = self._plans.popitem(last=False)
                num_rows -= len(oldest.rows)
        return found

    def held(self, scheduler: str, num_inference_steps: int, begin_step: int = 0) -> Plan | None:
        """Returns the plan if it was compiled before; never waits.

        Raises:
            InvalidRequest: SCHEDULER_UNKNOWN.
        """
        found = self.held_with_digest(scheduler, num_inference_steps, begin_step)
        return None if found is None else found[0]

    def held_with_digest(
        self, scheduler: str, num_inference_steps: int, begin_step: int = 0
    ) -> tuple[Plan, bytes] | None:
        """Returns the plan and its digest if it was compiled before; see `held`."""
        key = (schedulers.find(scheduler).name, num_inference_steps, begin_step)
        with self._lock:
            if key not in self._plans:
                return None
            self._plans.move_to_end(key)
            return self._plans[key]

    def _compile(self, spec: schedulers.SchedulerSpec, num_inference_steps: int, begin_step: int) -> Plan:
        import diffusers  # the class is imported when it is first asked for, which is slow

        return compile_named(
            diffusers, self._base_config, spec.name, num_inference_steps, torch.from_numpy, begin_step=begin_step
        )

    def usable(self, num_inference_steps: int) -> list[str]:
        """Returns the names of the schedulers that can be plans for this model; tried once for a configuration."""
        return list(_usable(json.dumps(self._base_config, sort_keys=True, default=str), num_inference_steps))


@functools.lru_cache(maxsize=64)
def _usable(base_config: str, num_inference_steps: int) -> tuple[str, ...]:
    compiler, names = PlanCompiler(json.loads(base_config)), []
    for spec in schedulers.SCHEDULERS:
        try:
            compiler.plan(spec.name, num_inference_steps)
            names.append(spec.name)
        except HybridSDError as error:
            log.debug("scheduler_left_out", scheduler=spec.name, reason=error.message)
    return tuple(names)


def default_scheduler(base_config: Mapping[str, Any]) -> str:
    """Returns the name of the table that is nearest to a model's own scheduler; "dpmpp_2m" where there is none."""
    same_class = [schedulers.find(name) for name in schedulers.same_class(base_config)]
    for spec in same_class:
        if all(base_config.get(key, value) == value for key, value in spec.overrides.items()):
            return spec.name
    return same_class[0].name if same_class else "dpmpp_2m"


def own_scheduler(base_config: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the name that means exactly a model's own scheduler, and what of its configuration is not followed.

    Raises:
        InvalidRequest: SCHEDULER_NOT_AFFINE if diffusers cannot make it.
    """
    if not base_config.get("_class_name"):
        return "dpmpp_2m", ""
    import diffusers

    name = schedulers.name_of(diffusers, base_config)
    clipping = " and ".join(schedulers.clipping(diffusers, base_config))
    return name, f"{clipping} of scheduler_config.json is off: no plan can clip values" if clipping else ""
