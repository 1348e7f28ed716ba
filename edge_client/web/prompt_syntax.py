"""AUTOMATIC1111's prompts: adapters as <lora:name:weight>, and the syntax that we do not have, which is refused.

Weights of words are read where texts are encoded, in `hybridsd.prompting`.
"""

import re

from edge_client.web.schemas.native import Lora
from hybridsd.errors import HybridSDError, Reason

EMPTY = "()"
"""A text of no words: what an empty prompt becomes, which elsewhere is a mistake."""
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_KEYWORDS = re.compile(r"\b(?:AND|BREAK)\b")
_TOKENS = re.compile(r"\\.|[\[\]|:]", re.DOTALL)
_STEP = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*")


def read_prompt(text: str) -> tuple[str, list[Lora]]:
    """Splits a prompt into its text, `EMPTY` where there is none, and the adapters that it names.

    Raises:
        InvalidRequest: FIELD_INVALID for syntax that means something in AUTOMATIC1111 and nothing here.
    """
    loras = [_lora(kind, arguments.split(":")) for kind, arguments in _NETWORK.findall(text)]
    words = _NETWORK.sub("", text).strip()
    check_syntax(words, "prompt")
    return words or EMPTY, loras


def check_syntax(text: str, field: str) -> None:
    """Makes sure that a text, without adapters, means here what it means there.

    Raises:
        InvalidRequest: FIELD_INVALID if it does not.
    """
    found = _find_schedule(text)
    if found is not None:
        raise _refuse(field, f"{found[:40]!r} changes the text on the way, which is not supported", r"\[ and \]")
    for keyword in _KEYWORDS.findall(text):
        if keyword == "BREAK" or field == "prompt":  # AND is a word in a negative prompt, there too
            raise _refuse(field, f"{keyword} joins texts, which is not supported", "small letters")


def _lora(kind: str, arguments: list[str], field: str = "prompt") -> Lora:
    name, weight, *rest = [*arguments, "1"] if len(arguments) == 1 else arguments
    if kind != "lora" or rest:
        raise _refuse(field, f"<{kind}:{':'.join(arguments)[:40]}> is not supported", "<lora:name:weight>")
    try:
        return Lora(name=name.strip(), weight=float(weight))
    except ValueError as error:
        raise _refuse(
            field, f"<lora:{name[:40]}:{weight[:20]}> is no name with a weight of -4 to 4", "<lora:name:0.8>"
        ) from error


def _find_schedule(text: str) -> str | None:
    """Returns the first [from:to:when] or [one|other]; None without one. Escaped brackets are text."""
    opened: list[tuple[int, int, bool]] = []  # where, its last colon, whether it has a |
    for token in _TOKENS.finditer(text):
        match token[0]:
            case "[":
                opened.append((token.start(), -1, False))
            case ":" if opened:
                opened[-1] = (opened[-1][0], token.end(), opened[-1][2])
            case "|" if opened:
                opened[-1] = (*opened[-1][:2], True)
            case "]" if opened:
                begin, colon, alternates = opened.pop()
                if alternates or (colon >= 0 and _STEP.fullmatch(text, colon, token.start())):
                    return text[begin : token.end()]
    return None


def _refuse(field: str, what: str, instead: str) -> HybridSDError:
    return Reason.FIELD_INVALID.error(f"`{field}`: {what}; leave it out, or write {instead}", field=field)
