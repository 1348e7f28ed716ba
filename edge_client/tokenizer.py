"""Text to token ids. Knows the `tokenizers` library and a length; nothing of models."""

from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from hybridsd.errors import InvalidRequest, Reason


class Tokenizer:
    """A `tokenizer.json`, cut and padded to one length.

    Args:
        path: File of the `tokenizers` library; its post-processor adds begin and end.
        context_length: Tokens of the result, begin and end included.

    Raises:
        InvalidRequest: MANIFEST_INVALID if the file is not a tokenizer.
    """

    def __init__(self, path: Path, context_length: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InvalidRequest(
                Reason.MANIFEST_INVALID, f"{path} is not a tokenizer: {error}; fetch the bundle again", field="bundle"
            ) from error
        self._context_length = context_length
        self._padding = {**(self._tokenizer.padding or {}), "length": context_length}
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> tuple[NDArray[np.int64], int]:
        """Returns token ids, int64 [context_length], and how many tokens of the text did not fit."""
        self._tokenizer.no_padding()
        encoding = self._tokenizer.encode(text)
        num_dropped = max(0, len(encoding.ids) - self._context_length)
        if num_dropped:
            self._tokenizer.enable_truncation(self._context_length)
            encoding = self._tokenizer.encode(text)
            self._tokenizer.no_truncation()
        encoding.pad(
            self._context_length, pad_id=self._padding.get("pad_id", 0), pad_token=self._padding.get("pad_token", "")
        )
        return np.asarray(encoding.ids, dtype=np.int64), num_dropped
