"""What the header of a .safetensors file tells before anybody reads a tensor: whether it is one, and all there.

Knows the format of the file alone. Reads the header, never the tensors.
"""

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
"""Bytes, as the safetensors library has it."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"


class WeightsError(ValueError):
    """A file does not hold the weights that it should; the message says why and what to do."""


def read_header(path: Path) -> Mapping[str, Any]:
    """Returns the entries of a .safetensors file: tensors by name, and "__metadata__" where there is any.

    Raises:
        WeightsError: If it is a pointer of git-lfs, cut off, or no such file.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
            if begin == _POINTER:
                raise WeightsError(
                    f"{path} is a pointer of git-lfs, not the weights; run git lfs pull in its folder, or download the"
                    " file itself"
                )
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError("it does not begin like a .safetensors file")
            text = file.read(length)
        size = path.stat().st_size
        if len(text) < length:
            raise WeightsError(f"{path} is cut off within its header, at {size} bytes; download it again")
        header: Mapping[str, Any] = json.loads(text)
        wanted = (
            8
            + length
            + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        )
    except WeightsError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        struct.error,
        RecursionError,
    ) as error:
        raise WeightsError(f"{path} cannot be read: {error}; download it again") from error
    if size < wanted:
        raise WeightsError(f"{path} is cut off: it has {size} of {wanted} bytes; download it again")
    return header


def is_unet(names: Collection[str]) -> bool:
    """Whether these are the tensors of a U-Net alone, by diffusers' names."""
    return any(name.startswith("down_blocks.") for name in names) and "conv_in.weight" in names


def scheduler_changes(header: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint in one file says of its training, as options of scheduler_config.json.

    Merged checkpoints say it with empty tensors, `v_pred` and `ztsnr` (zero terminal SNR); others in the metadata of
    Stability's "modelspec".
    """
    metadata = header.get("__metadata__") or {}
    said = str(metadata.get("modelspec.predict_key", "")).casefold()
    changes: dict[str, Any] = {}
    if _V_PREDICTION in header or said == "v":
        changes["prediction_type"] = "v_prediction"
    elif said in ("epsilon", "eps"):
        changes["prediction_type"] = "epsilon"
    if _ZERO_SNR in header:
        changes["rescale_betas_zero_snr"] = True
    return changes
