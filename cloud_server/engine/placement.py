"""Which device a job steps on: where the calls of all its jobs, one for each kind, then take least time.

That one rule makes batches where batches pay and spreads jobs where they do not: a call of five rows that costs hardly
more than one of four draws a job to its like; one that costs 5/4 sends it to a device that does nothing. A model that
is not loaded on a device costs its loading, shared among the job's calls. Knows nothing of threads or models.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence

MAX_KINDS = 256
"""Kinds of jobs whose cost is remembered."""
MEMORY = 0.8
"""Weight of the past in the mean cost of calls of one size."""
MIN_GAIN = 0.1
"""Part of a device's round that a move must save: a job that changes devices leaves its batch."""
UNKNOWN_S = 1.0
"""Of a call of one job, where none of any kind has run; only ratios matter then."""


class StepCosts:
    """Measured seconds of a call of the U-Net, by kind of job and number of jobs in it."""

    def __init__(self) -> None:
        """Starts with none."""
        self._kinds: OrderedDict[Hashable, dict[int, float]] = OrderedDict()
        self._mean_s = 0.0

    def note(self, kind: Hashable, num_jobs: int, elapsed_s: float) -> None:
        """Remembers a call."""
        sizes = self._kinds.setdefault(kind, {})
        self._kinds.move_to_end(kind)
        sizes[num_jobs] = _mean(sizes.get(num_jobs), elapsed_s)
        self._mean_s = _mean(self._mean_s or None, elapsed_s / num_jobs)
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)

    def call_s(self, kind: Hashable, num_jobs: int) -> float:
        """Returns what a call of so many jobs takes: on the lines through the sizes that were measured.

        Beyond them it grows as between the last two; where one size alone is known, by the number of jobs.
        """
        if num_jobs <= 0:
            return 0.0
        known = sorted(self._kinds.get(kind, {}).items())
        if not known:
            return (self._mean_s or UNKNOWN_S) * num_jobs
        if num_jobs <= known[0][0] or len(known) == 1:
            size, cost = known[0]
            return cost * num_jobs / size
        upper = next((index for index, (size, _) in enumerate(known) if size >= num_jobs), len(known) - 1)
        (left, left_s), (right, right_s) = known[upper - 1], known[upper]
        slope = max(0.0, (right_s - left_s) / (right - left))  # a larger batch never costs less
        return left_s + slope * (num_jobs - left)


class Placement:
    """The devices, and what a round of calls takes on each."""

    def __init__(
        self,
        num_devices: int = 1,
        *,
        load_s: Callable[[str, int], float] = lambda _model, _device: 0.0,
    ) -> None:
        """Takes how many devices there are, and what loading a model on one takes: 0 where it is loaded."""
        self.costs = StepCosts()
        self._is_well, self._load_s = [True] * num_devices, load_s

    @property
    def num_devices(self) -> int:
        """All, lost ones too."""
        return len(self._is_well)

    @property
    def num_well(self) -> int:
        """Those that work."""
        return sum(self._is_well)

    def is_well(self, device: int) -> bool:
        """Whether a device works."""
        return self._is_well[device]

    def lose(self, device: int) -> None:
        """Places nothing on a device any more."""
        self._is_well[device] = False

    def restore(self, device: int) -> None:
        """Places jobs on a device again."""
        self._is_well[device] = True

    def round_s(self, kinds: Counter[Hashable]) -> float:
        """Returns what one call for each kind of jobs takes."""
        return sum(self.costs.call_s(kind, number) for kind, number in kinds.items())

    def choose(self, loads: Sequence[Counter[Hashable]], kind: Hashable, models: Sequence[str], num_calls: int) -> int:
        """Returns the device for a new job.

        Args:
            loads: How many jobs of each kind each device has.
            kind: Of the job.
            models: That it needs.
            num_calls: That it will take.

        Raises:
            ValueError: If no device works.
        """

        def cost_s(device: int) -> tuple[float, float]:
            after = loads[device].copy()
            after[kind] += 1
            cold_s = self._cold_s(models, device) / max(1, num_calls)
            return self.round_s(after) + cold_s, sum(after.values())

        return min((device for device in range(self.num_devices) if self._is_well[device]), key=cost_s)

    def relief(
        self, loads: Sequence[Counter[Hashable]], device: int, kind: Hashable, models: Sequence[str]
    ) -> int | None:
        """Returns the device that a job is better moved to: both rounds are shorter than its own is now.

        Args:
            loads: See `choose`.
            device: Where the job is.
            kind: Of the job.
            models: That it needs; it moves only to where they are loaded.
        """
        now_s = self.round_s(loads[device])
        left = loads[device].copy()
        left[kind] -= 1
        left_s, best, best_s = self.round_s(left), None, now_s * (1.0 - MIN_GAIN)
        for other in range(self.num_devices):
            if other == device or not self._is_well[other] or self._cold_s(models, other) > 0:
                continue
            joined = loads[other].copy()
            joined[kind] += 1
            worst_s = max(left_s, self.round_s(joined))
            if worst_s < best_s:
                best, best_s = other, worst_s
        return best

    def _cold_s(self, models: Sequence[str], device: int) -> float:
        return sum(self._load_s(model, device) for model in models)


def _mean(past_s: float | None, new_s: float) -> float:
    return new_s if past_s is None else MEMORY * past_s + (1.0 - MEMORY) * new_s
