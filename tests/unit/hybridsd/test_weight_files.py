"""What a .safetensors file is, by its header alone."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hybridsd import weight_files
from hybridsd.weight_files import WeightsError


def test_a_whole_file_tells_its_names(tmp_path: Path) -> None:
    """Names, shapes and metadata, without a tensor read."""
    path = tmp_path / "whole.safetensors"
    save_file({"conv_in.weight": np.ones((2, 3), np.float32)}, path, metadata={"format": "pt"})
    header = weight_files.read_header(path)

    assert header["conv_in.weight"]["shape"] == [2, 3]
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("kept", [0, 4, 20, 90, 120])
def test_a_cut_file_is_said_to_be_cut(tmp_path: Path, kept: int) -> None:
    """Wherever it was cut: within the length, the header or the tensors."""
    path = tmp_path / "cut.safetensors"
    save_file({"weight": np.ones((64, 64), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="download it again"):
        weight_files.read_header(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "cannot be read"),
        (struct.pack("<Q", 16) + json.dumps({"a": {"x": 1}}).encode().ljust(16), "cannot be read"),
    ],
)
def test_what_is_none_is_told_apart(tmp_path: Path, content: bytes, says: str) -> None:
    """A pointer, a page of a web site, another header."""
    path = tmp_path / "none.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=says):
        weight_files.read_header(path)


@pytest.mark.parametrize(
    ("header", "changes"),
    [
        ({"a": {}}, {}),
        ({"v_pred": {}}, {"prediction_type": "v_prediction"}),
        ({"v_pred": {}, "ztsnr": {}}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ({"__metadata__": {"modelspec.predict_key": "v"}}, {"prediction_type": "v_prediction"}),
        ({"__metadata__": {"modelspec.predict_key": "epsilon"}}, {"prediction_type": "epsilon"}),
        ({"__metadata__": None}, {}),
    ],
)
def test_what_a_checkpoint_says_of_its_training(header: dict[str, object], changes: dict[str, object]) -> None:
    """Empty tensors of merged checkpoints, and the metadata of others."""
    assert weight_files.scheduler_changes(header) == changes
