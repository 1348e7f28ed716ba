"""Prompt lists: alternating lines, and CSV."""

import pytest

from edge_client.cli import prompt_files
from edge_client.cli.prompt_files import PromptPair
from hybridsd.errors import InvalidRequest


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
