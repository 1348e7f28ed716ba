"""Labels of metrics whose number is bounded, whatever names come."""

OTHER = "other"
"""What stands for every name beyond the bound."""


class BoundedLabel:
    """Lets the first names through, and makes one of all others. Whoever decides over names makes no series."""

    def __init__(self, limit: int) -> None:
        """Takes how many names there may be."""
        self._limit = limit
        self._names: set[str] = set()

    def __call__(self, name: str) -> str:
        """Returns the name, or `OTHER`."""
        if name in self._names:
            return name
        if len(self._names) >= self._limit:
            return OTHER
        self._names.add(name)
        return name
