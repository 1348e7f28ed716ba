"""Reads the metrics, labels and functions out of a PromQL expression, as far as our dashboards and rules go."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*
      | (?P<string> "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*')
      | (?P<range> \[ [^\]]* \])
      | (?P<number> \d[\d.]*(?:e[+-]?\d+)?[smhdwy]*)
      | (?P<name> [A-Za-z_:][A-Za-z0-9_:]*)
      | (?P<mark> =~|!~|!=|==|<=|>=|[-+*/%^(){},<>=])
    """,
    re.VERBOSE,
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset"}
RATES = {"rate", "irate", "increase"}


@dataclass
class Selector:
    """A metric of an expression."""

    name: str
    matchers: list[tuple[str, str, str]] = field(default_factory=list)
    """Label, operator, value."""
    has_range: bool = False
    functions: tuple[str, ...] = ()
    """Around it, the outermost first."""


@dataclass
class Expression:
    """What an expression asks for."""

    selectors: list[Selector] = field(default_factory=list)
    groupings: list[tuple[tuple[str, ...], set[str]]] = field(default_factory=list)
    """Labels of each `by`, `on` and so on, with the functions around them."""


def parse(text: str) -> Expression:
    """Returns what an expression asks for.

    Raises:
        ValueError: If it is not understood.
    """
    tokens, found, stack = list(_tokens(text)), Expression(), []
    index = 0

    def labels() -> set[str]:
        nonlocal index
        names = set()
        while tokens[index] != ("mark", ")"):
            if tokens[index][0] == "name":
                names.add(tokens[index][1])
            index += 1
        index += 1
        return names

    while index < len(tokens):
        kind, value = tokens[index]
        following = tokens[index + 1] if index + 1 < len(tokens) else ("", "")
        index += 1
        if kind == "mark" and value == "(":
            stack.append("")
        elif kind == "mark" and value == ")":
            stack.pop()
        elif kind == "name" and value in _GROUPING and following == ("mark", "("):
            index += 1
            inside = tuple(filter(None, stack))
            before = tokens[index - 3][1] if index >= 3 else ""  # `sum by (le) (...)`
            found.groupings.append(((*inside, before), labels()))
        elif kind == "name" and value not in _WORDS and following == ("mark", "("):
            index += 1
            stack.append(value)
        elif kind == "name" and value not in _WORDS and following[1:] and following[1] in _GROUPING:
            pass  # an aggregation, whose labels come first
        elif kind == "name" and value not in _WORDS:
            selector = Selector(value, functions=tuple(filter(None, stack)))
            if following == ("mark", "{"):
                index += 1
                while tokens[index] != ("mark", "}"):
                    if tokens[index] == ("mark", ","):
                        index += 1
                        continue
                    label, operator, wanted = (tokens[index + offset][1] for offset in range(3))
                    selector.matchers.append((label, operator, wanted[1:-1]))
                    index += 3
                index += 1
            if index < len(tokens) and tokens[index][0] == "range":
                selector.has_range = True
                index += 1
            found.selectors.append(selector)
    if stack:
        raise ValueError(f"a bracket is not closed in {text!r}")
    return found


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"{text[position:][:20]!r} is not understood in {text!r}")
        if match.lastgroup is not None:
            yield match.lastgroup, match[0]
        position = match.end()
