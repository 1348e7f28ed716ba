"""What is said of many requests at once: percentiles, fairness, a line through samples. Knows nothing of servers."""

import math
from collections.abc import Mapping, Sequence


def percentile(values: Sequence[float], part: float) -> float:
    """Returns the smallest value that at least `part` of all do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def jain(shares: Sequence[float]) -> float:
    """Returns Jain's index of fairness: 1 where all are equal, 1/n where one has all; NaN where nobody has anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else math.nan


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the line of least squares through (x, y); 0 of fewer than two."""
    if len(samples) < 2:
        return 0.0
    mean_x, mean_y = (sum(column) / len(samples) for column in zip(*samples, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


def table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a Markdown table; a column that no row has is left out."""
    shown = [column for column in columns if any(row.get(column) for row in rows)]
    lines = [shown, ["---"] * len(shown), *([row.get(column, "") for column in shown] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
