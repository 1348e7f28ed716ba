"""Numbers on the command line.

Knows nothing of what they are for.
"""

import math
from typing import Any

import click


class RealRange(click.FloatRange):
    """A range that NaN is not in: it would pass every comparison, and a limit of it would never be reached."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number
