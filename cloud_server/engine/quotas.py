"""What a principal may have: how many jobs, how many steps a minute. Knows nothing of threads, models or messages."""

import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloud_server.engine.caller import Caller
from hybridsd.errors import HybridSDError, Reason
from hybridsd.quotas import Bucket
from hybridsd.tokens import Quota

if TYPE_CHECKING:
    from cloud_server.engine.job import Job

MAX_ACCOUNTS = 4096
"""Principals whose steps are counted; of more, those that asked longest ago begin anew."""
MAX_PROMISES = 256
"""Of a principal; further refusals are estimates alone."""
MIN_RETRY_S = 0.5
MAX_PROMISE_S = 120.0
"""So far ahead steps are kept for who was refused; beyond it, delays are random up to this."""
GRACE_S = 5.0
"""For so long after its time a promise is kept."""
JITTER = 0.05
"""Part of a delay that is added at random at most."""
Key = tuple[str, str]
"""Of a job, see `Job.key`."""


@dataclass(slots=True)
class _Account:
    """The steps of a principal."""

    bucket: Bucket
    promises: dict[Key, tuple[float, int]] = field(default_factory=dict)
    """When who was refused was told to come again, in seconds of the clock, and for how many steps."""


class Quotas:
    """Steps of each principal in the last minute. Not safe for several threads: the engine holds its lock.

    A refusal is a promise: the steps are kept until its job comes again, so that one retry is enough.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, rand: Callable[[], float] = random.random) -> None:
        """Takes a clock, in seconds that never go back, and what draws numbers from 0 up to 1."""
        self._clock, self._rand = clock, rand
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def check(self, caller: Caller, key: Key, steps: int) -> None:
        """Refuses what `charge` would refuse, and charges nothing.

        Raises:
            HybridSDError: QUOTA_EXCEEDED, with a retry delay where coming again helps.
        """
        limit = caller.quota.steps_per_minute
        if limit is None:
            return
        if steps > limit:
            raise _exceeded(
                caller,
                "steps_per_minute",
                f"the job has {steps} steps, and {caller.principal} may have {limit} a minute; ask for at most that",
            )
        account, now_s = self._account(caller, limit), self._clock()
        promises = {other: told for other, told in account.promises.items() if now_s <= told[0] + GRACE_S}
        account.promises = promises
        mine = promises.get(key)
        kept = sum(num for other, (due_s, num) in promises.items() if other != key and (not mine or due_s < mine[0]))
        left = account.bucket.left - kept
        if left >= steps - 1e-6:
            return
        wait_s = max(MIN_RETRY_S, (steps - left) * 60 / limit)
        if wait_s > MAX_PROMISE_S:
            delay_s = MAX_PROMISE_S * (1 + self._rand()) / 2
        else:
            delay_s = wait_s + self._rand() * (0.1 + JITTER * wait_s)
            if key[1] and (mine or len(promises) < MAX_PROMISES):  # whoever has no id cannot be known again
                promises[key] = (now_s + wait_s, steps)
        raise _exceeded(
            caller,
            "steps_per_minute",
            f"{caller.principal} may have {limit} steps a minute, of which {max(0, int(left))} are left, and the job"
            f" has {steps}; come again in {delay_s:.1f} s",
            delay_s,
        )

    def charge(self, caller: Caller, key: Key, steps: int) -> None:
        """Takes the steps of a job from what its principal may have in a minute.

        Raises:
            HybridSDError: QUOTA_EXCEEDED, with a retry delay where coming again helps; nothing is taken then.
        """
        self.check(caller, key, steps)
        account = self._accounts.get(caller.principal)
        if account is not None and caller.quota.steps_per_minute is not None:
            account.bucket.take(min(steps, account.bucket.left))
            account.promises.pop(key, None)

    def end(self, job: "Job") -> None:
        """Gives back the steps of a job that it did not run."""
        self.give_back(job.caller, max(0, job.num_asked_calls - job.num_calls))

    def give_back(self, caller: Caller, steps: int) -> None:
        """Gives back steps that were charged and are not run."""
        account = self._accounts.get(caller.principal)
        if account is not None and caller.quota.steps_per_minute is not None:
            account.bucket.give_back(steps)

    def _account(self, caller: Caller, limit: int) -> _Account:
        account = self._accounts.get(caller.principal)
        if account is None:
            account = self._accounts[caller.principal] = _Account(Bucket(limit, self._clock))
        elif account.bucket.per_minute != limit:
            account.bucket.resize(limit)
        self._accounts.move_to_end(caller.principal)
        while len(self._accounts) > MAX_ACCOUNTS:
            self._accounts.popitem(last=False)
        return account


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


def _exceeded(caller: Caller, limit: str, message: str, retry_delay_s: float | None = None) -> HybridSDError:
    error = Reason.QUOTA_EXCEEDED.error(message, retry_delay_s=retry_delay_s)
    error.quota = f"token {caller.principal}: {limit}"
    return error
