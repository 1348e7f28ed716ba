"""What crosses the wire for SD 1.x shapes at 512x512 stays within the aims; sizes do not depend on the weights."""

from pathlib import Path

import pytest

from tests.support.wire import measure

pytestmark = pytest.mark.slow

KIB = 1024


def test_bytes_for_a_512_picture(tmp_path: Path) -> None:
    """fp16 190 KiB, int8 100 KiB, 40 KiB when the embeddings are known: DPM-Solver++ 2M, guidance, hand-off only."""
    rows = {(row["codec"], row["prompt"]): row for row in measure(tmp_path, ("fp16", "int8"))}

    assert int(rows["fp16", "new"]["all"]) <= 190 * KIB
    assert int(rows["int8", "new"]["all"]) <= 100 * KIB
    assert int(rows["int8", "known"]["all"]) <= 40 * KIB
    assert int(rows["fp16", "new"]["state"]) >= 2 * 32 * KIB  # both arrays are there: the solver's memory too
    assert int(rows["fp16", "new"]["embeds"]) >= 77 * 768 * 2
    assert rows["int8", "known"]["embeds"] == 0
    assert rows["int8", "own"]["embeds"] == 2 * 16 * 4  # samples of both texts
    assert int(rows["int8", "own"]["all"]) - int(rows["int8", "own"]["state"]) <= KIB
