"""Text to token ids, with the `tokenizers` library."""

from pathlib import Path

import tokenizers

from hybridsd.errors import HybridSDError, Reason


class Tokenizer:
    """A `tokenizer.json`.

    Args:
        path: File of the `tokenizers` library; its post-processor adds begin and end.

    Attributes:
        bos: Id of the token that begins every text.
        eos: Id of the token that ends it.
        pad: Id of the token that fills it up.

    Raises:
        InvalidRequest: MANIFEST_INVALID if the file is not a tokenizer, or adds no begin and end.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _invalid(f"{path} is not a tokenizer: {error}; fetch the bundle again") from error
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.encode("").ids
        if len(ids) != 2:
            raise _invalid(f"{path} adds {len(ids)} tokens to a text, not begin and end; export the bundle again")
        self.bos, self.eos = ids
        self.pad = int(padding.get("pad_id", self.eos))

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, without begin and end; as many as there are."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _invalid(message: str) -> HybridSDError:
    return Reason.MANIFEST_INVALID.error(message, field="bundle")
