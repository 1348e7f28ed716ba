"""AUTOMATIC1111's prompts: what is read, and what is refused because it would be drawn as words."""

import pytest

from edge_client.web.prompt_syntax import EMPTY, check_syntax, read_prompt
from hybridsd.errors import InvalidRequest
from hybridsd.prompting import parse_weights


@pytest.mark.parametrize(
    ("text", "words", "loras"),
    [
        ("a fox", "a fox", []),
        ("a <lora:style:0.8> fox", "a  fox", [("style", 0.8)]),
        ("<lora:a><lora:b:-.5> fox", "fox", [("a", 1.0), ("b", -0.5)]),
        ("", EMPTY, []),
        ("<lora:a:1>", EMPTY, [("a", 1.0)]),
        (r"\[a|b\] [fog] (a:1.2) a | b: 0.5", r"\[a|b\] [fog] (a:1.2) a | b: 0.5", []),
        ("[a:b", "[a:b", []),
        ("sand and BRANDY, break", "sand and BRANDY, break", []),
        ("[(red:1.2) fox]", "[(red:1.2) fox]", []),
    ],
)
def test_what_is_read(text: str, words: str, loras: list[tuple[str, float]]) -> None:
    read, found = read_prompt(text)

    assert read == words
    assert [(lora.name, lora.weight) for lora in found] == loras


@pytest.mark.parametrize(
    "text",
    [
        "[red:blue:0.5] fox", "[red:10]", "[:blue:.25]", "[a|b]", "[a|]", "[(a|b)]", "[[red:blue:3] fox]",
        "[a (b:1.2):c: 5 ]", "a AND b", "a BREAK b", "<hypernet:x:1>", "<lora:a:1:2>", "<lora:a:te=1>", "<lora:a:9>",
        "<lyco:a:1>", "<lora::1>",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_prompt(text)

    assert caught.value.field == "prompt"


def test_negative_prompts() -> None:
    """Know no AND, there neither."""
    check_syntax("text AND logos", "negative_prompt")
    for text in ("a BREAK b", "[a|b]"):
        with pytest.raises(InvalidRequest) as caught:
            check_syntax(text, "negative_prompt")
        assert caught.value.field == "negative_prompt"


def test_the_empty_text() -> None:
    assert parse_weights(EMPTY) == [("", 1.0)]
