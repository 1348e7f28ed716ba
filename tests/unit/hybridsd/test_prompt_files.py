"""Prompt lists: alternating lines, and CSV."""

import pytest

from hybridsd import prompt_files
from hybridsd.errors import InvalidRequest
from hybridsd.prompt_files import PromptPair


def test_prompt_pairs() -> None:
    """Line ends, blank pairs, three quotes and a missing last line are all forgiven."""
    text = '\ufeffa fox \r\nblurry\r\n\r\n\r\na dog\n\na cat\n"""\na bird'

    assert prompt_files.parse_prompts(text) == [
        PromptPair("a fox", "blurry"),
        PromptPair("a dog"),
        PromptPair("a cat"),
        PromptPair("a bird"),
    ]
    with pytest.raises(InvalidRequest, match="no prompt"):
        prompt_files.parse_prompts(' \n"""\n')


def test_csv_needs_rows() -> None:
    """A header alone is not a job."""
    with pytest.raises(InvalidRequest, match="no rows"):
        prompt_files.parse_csv(["name,caption", ""])


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_line_ends_end_lines(mark: str) -> None:
    """What Unicode counts as a line boundary may stand in a prompt; only CR and LF end it."""
    pairs = prompt_files.parse_prompts(f"a cat{mark}sitting\nblurry\r\na dog\rugly\n")

    assert pairs == [PromptPair(f"a cat{mark}sitting", "blurry"), PromptPair("a dog", "ugly")]
    assert prompt_files.parse_csv(["name,caption\n", f"a.png,a cat{mark}sitting\n"])[0].prompt == f"a cat{mark}sitting"


def test_a_comma_without_quotes_is_no_column() -> None:
    """A row with more cells than the header is refused, not read as a negative prompt."""
    for header, row in (("name,caption", "a.png,a cat, on a mat"), ("name,caption,negative", "a.png,a cat,b,c")):
        with pytest.raises(InvalidRequest, match=r"CSV line 2 has . cells, the header .; put a caption"):
            prompt_files.parse_csv([f"{header}\n", f"{row}\n"])
    rows = ["name,caption\n", 'a.png,"a cat, on a mat"\n', "b.png,a dog,\n"]  # an empty cell too many is no harm

    assert [pair.prompt for pair in prompt_files.parse_csv(rows)] == ["a cat, on a mat", "a dog"]
