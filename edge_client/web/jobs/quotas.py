"""What a job asks for, and how much of that its token may have."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge_client.web.auth import Caller
from hybridsd.errors import HybridSDError, Reason
from hybridsd.quotas import Bucket, jittered


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a job asks of the models, at cloud and edge together."""

    steps: int = 0
    """Of the U-Net, of all its images; 0: not known, of a job that an older gateway took."""
    width: int = 0
    height: int = 0
    """Of one image, in pixels; as it is drawn or kept, whichever is larger."""

    @property
    def cost(self) -> float:
        """What shares are counted in: pixels times steps, above 0."""
        return float(max(self.steps * self.width * self.height, 1))


class AnyBucket(Protocol):
    """A `hybridsd.quotas.Bucket`, wherever it is kept."""

    @property
    def per_minute(self) -> float:
        """How much it holds, and gets in a minute."""

    @property
    def left(self) -> float:
        """How much can be taken now."""

    def take(self, amount: float) -> float:
        """Takes an amount and returns 0, or returns the seconds until it is there."""

    def give_back(self, amount: float) -> None:
        """Puts back what was taken and not used."""


class Quotas:
    """What tokens have used of their limits. Safe to use from several threads.

    Args:
        clock: Returns seconds, which never go back.
        shared: Returns the bucket that replicas share of an owner, by its steps a minute; None: there are none.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        shared: Callable[[str, float], AnyBucket] | None = None,
    ) -> None:
        self._clock, self._shared = clock, shared
        self._buckets: dict[str, Bucket] = {}

    def take(self, caller: Caller, work: Work) -> None:
        """Takes what a job needs: all of its steps, at once.

        Raises:
            InvalidRequest: SIZE_INVALID, STEPS_INVALID; the token never allows that.
            CloudBusy: QUOTA_EXCEEDED, with the time until there are so many steps.
        """
        limit, num_pixels = caller.quota.pixels, work.width * work.height
        if limit is not None and num_pixels > limit:
            raise Reason.SIZE_INVALID.error(
                f"`width` {work.width} and `height` {work.height} make {num_pixels} pixels; the token allows at most "
                f"{limit} (its limit pixels): choose a smaller image",
                field="width",
            )
        bucket = self._bucket(caller)
        wait_s = 0.0 if bucket is None else bucket.take(work.steps)
        if bucket is None or wait_s == 0:
            return
        if math.isinf(wait_s):
            raise Reason.STEPS_INVALID.error(
                f"the images of the job need {work.steps} steps; the token allows at most {bucket.per_minute:g} a "
                "minute (its limit steps_per_minute): choose fewer images, or fewer `num_inference_steps`",
                field="num_inference_steps",
            )
        left = f"{int(bucket.left)} are left of the {bucket.per_minute:g} that the token allows a minute"
        raise exceeded(f"the job needs {work.steps} steps, and {left} (its limit steps_per_minute)", wait_s)

    def give_back(self, caller: Caller, steps: int) -> None:
        """Gives back steps that were taken and not run."""
        bucket = self._bucket(caller)
        if bucket is not None and steps > 0:
            bucket.give_back(steps)

    def steps_left(self, caller: Caller) -> float | None:
        """Returns how many steps a token may take now; None: it has no limit."""
        bucket = self._bucket(caller)
        return None if bucket is None else bucket.left

    def _bucket(self, caller: Caller) -> AnyBucket | None:
        limit = caller.quota.steps_per_minute
        if limit is None:
            return None
        if self._shared is not None:
            return self._shared(caller.owner, limit)
        bucket = self._buckets.get(caller.owner)
        if bucket is None:
            bucket = self._buckets[caller.owner] = Bucket(limit, self._clock)
        elif bucket.per_minute != limit:  # the operator has changed it
            bucket.resize(limit)
        return bucket


def exceeded(what: str, wait_s: float) -> HybridSDError:
    """Returns the refusal of what is beyond a limit.

    Args:
        what: Which limit, and how much of it is used.
        wait_s: Until there is room again, in seconds.
    """
    delay_s = whole_delay(wait_s)
    return Reason.QUOTA_EXCEEDED.error(f"{what}; come again in {delay_s} s", retry_delay_s=float(delay_s))


def whole_delay(wait_s: float) -> int:
    """Returns a delay in whole seconds, from 1 on, with jitter; never shorter than what is to be waited."""
    return max(1, math.ceil(jittered(wait_s)))
