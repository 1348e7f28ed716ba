"""A page's tables are replaced, its prose is not, and a page that does not fit is refused."""

from pathlib import Path

import pytest

from training.evaluation.page import copy_figures, write

TABLES = {"head": "400 captions.\n", "curve": "| k |\n|---|\n| 8 |\n"}


def test_a_new_page_is_made_of_the_tables(tmp_path: Path) -> None:
    """And written again it is the same."""
    page = tmp_path / "results.md"
    write(page, TABLES)
    first = page.read_text()
    write(page, TABLES)

    assert "<!-- results: curve -->\n\n| k |" in first
    assert page.read_text() == first


def test_prose_stays_and_tables_change(tmp_path: Path) -> None:
    """Whatever stood between the markers is gone; groups of a pattern in a table are plain text."""
    page = tmp_path / "results.md"
    page.write_text(
        "# Mine\n\n<!-- results: head -->\nold\nolder\n<!-- end -->\n\nBetween.\n\n"
        "<!-- results: curve -->\n<!-- end -->\n"
    )
    write(page, {**TABLES, "head": r"\1 and \g<2>" + "\n"})
    text = page.read_text()

    assert text.startswith("# Mine\n\n<!-- results: head -->\n\n\\1 and \\g<2>\n\n<!-- end -->\n\nBetween.")
    assert "old" not in text
    assert "| 8 |" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: head -->\n<!-- end -->\n", "no marker for curve"),
        ("<!-- results: head -->\n<!-- end -->\n<!-- results: curves -->\n<!-- end -->\n", "marker of no table"),
        ("<!-- results: head -->\n<!-- results: curve -->\n", "the marker of head stands there 0 times with an end"),
        (
            "<!-- results: head -->\n<!-- end -->\n" * 2 + "<!-- results: curve -->\n<!-- end -->\n",
            "head stands there 2",
        ),
    ],
)
def test_a_page_that_does_not_fit_is_as_it_was(tmp_path: Path, text: str, message: str) -> None:
    """The message names the marker."""
    page = tmp_path / "results.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=message):
        write(page, TABLES)

    assert page.read_text() == text


def test_figures_that_are_there_are_copied(tmp_path: Path) -> None:
    """The curve gets the name that the page knows."""
    (tmp_path / "quality-dpmpp_2m-25.png").write_bytes(b"curve")
    copy_figures(tmp_path, "quality-dpmpp_2m-25.png", tmp_path / "images")

    assert [path.name for path in (tmp_path / "images").iterdir()] == ["demo-curve.png"]
