"""What a principal may have: how many jobs, how many steps a minute. Knows nothing of threads, models or messages."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloud_server.engine.caller import Caller
from hybridsd.errors import HybridSDError, Reason
from hybridsd.quotas import Bucket, jittered
from hybridsd.tokens import Quota

if TYPE_CHECKING:
    from cloud_server.engine.job import Job

MAX_BUCKETS = 4096
"""Principals whose steps are counted; of more, those that asked longest ago begin anew."""
MIN_RETRY_S = 0.5


class Quotas:
    """Steps of each principal in the last minute. Not safe for several threads: the engine holds its lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes a clock, in seconds that never go back."""
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def check(self, caller: Caller, steps: int) -> None:
        """Refuses what `charge` would refuse, and charges nothing.

        Raises:
            HybridSDError: QUOTA_EXCEEDED, with a retry delay where coming again helps.
        """
        bucket = self._bucket(caller)
        if bucket is not None and bucket.take(steps) == 0.0:
            bucket.give_back(steps)
        elif bucket is not None:
            raise _too_many_steps(caller, bucket, steps)

    def charge(self, caller: Caller, steps: int) -> None:
        """Takes the steps of a job from what its principal may have in a minute.

        Raises:
            HybridSDError: QUOTA_EXCEEDED, with a retry delay where coming again helps; nothing is taken then.
        """
        self.check(caller, steps)
        bucket = self._bucket(caller)
        if bucket is not None:
            bucket.take(steps)

    def end(self, job: "Job") -> None:
        """Gives back the steps of a job that it did not run."""
        bucket = self._buckets.get(job.caller.principal)
        if bucket is not None and job.caller.quota.steps_per_minute is not None:
            bucket.give_back(max(0, job.num_asked_calls - job.num_calls))

    def _bucket(self, caller: Caller) -> Bucket | None:
        """Returns what is left to a principal; None where that has no limit."""
        limit = caller.quota.steps_per_minute
        if limit is None:
            return None
        bucket = self._buckets.get(caller.principal)
        if bucket is None or bucket.per_minute != limit:
            used = 0.0 if bucket is None else bucket.per_minute - bucket.left
            bucket = Bucket(limit, self._clock)
            bucket.take(min(used, limit))  # a changed limit forgives nothing
            self._buckets[caller.principal] = bucket
        self._buckets.move_to_end(caller.principal)
        while len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket


def check_queued(
    caller: Caller, *, num_running: int, num_waiting: int, free_places: int, retry_delay_s: Callable[[], float]
) -> None:
    """Refuses a job that would wait behind as many of its principal as may wait.

    Args:
        caller: Who asks.
        num_running: Jobs of the principal that have a place.
        num_waiting: And those that wait.
        free_places: Of the server: a job that gets one does not wait.
        retry_delay_s: Returns when to come again, in seconds; random already.

    Raises:
        HybridSDError: QUOTA_EXCEEDED with the retry delay.
    """
    quota = caller.quota
    free = free_places if quota.jobs is None else min(free_places, max(0, quota.jobs - num_running))
    if quota.queued is not None and num_waiting - free >= quota.queued:
        raise _exceeded(
            caller,
            "queued",
            f"{num_waiting} jobs of {caller.principal} wait, and {quota.queued} may; come again when one has begun",
            retry_delay_s(),
        )


def check_pixels(quota: Quota, width: int, height: int) -> None:
    """Refuses an image that is too large for the caller's token.

    Raises:
        HybridSDError: SIZE_INVALID; coming again does not help.
    """
    if quota.pixels is not None and width * height > quota.pixels:
        raise Reason.SIZE_INVALID.error(
            f"{width}x{height} is {width * height} pixels, and the token allows {quota.pixels} an image; choose a"
            " smaller `width` and `height`",
            field="width",
        )


def _too_many_steps(caller: Caller, bucket: Bucket, steps: int) -> HybridSDError:
    limit, what = caller.quota.steps_per_minute or 0, f"{caller.principal} may have"
    if steps > limit:
        return _exceeded(
            caller, "steps_per_minute", f"the job has {steps} steps, and {what} {limit} a minute; ask for at most that"
        )
    wait_s = max(MIN_RETRY_S, (steps - bucket.left) * 60 / limit)
    return _exceeded(
        caller,
        "steps_per_minute",
        f"{what} {limit} steps a minute, of which {int(bucket.left)} are left and the job has {steps}; come again in"
        f" {wait_s:.0f} s",
        jittered(wait_s),
    )


def _exceeded(caller: Caller, limit: str, message: str, retry_delay_s: float | None = None) -> HybridSDError:
    error = Reason.QUOTA_EXCEEDED.error(message, retry_delay_s=retry_delay_s)
    error.quota = f"token {caller.principal}: {limit}"
    return error
