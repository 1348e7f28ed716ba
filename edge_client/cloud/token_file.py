"""The token that this device shows to clouds, from a file that may be replaced at any time."""

import contextlib
import threading
from pathlib import Path

from hybridsd import certificates
from hybridsd.errors import HybridSDError, Reason


class TokenFile:
    """The token in a file, as plain text; the file is read again when it has changed. Thread-safe.

    Args:
        path: Of the file.

    Raises:
        InvalidRequest: FIELD_INVALID if it cannot be read, or has not one token alone.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._stamp = certificates.stamp(path)
        self._token = _read(path)

    def __call__(self) -> str:
        """Returns the token of now; while the file is wrong, the one of before."""
        with self._lock:
            stamp = certificates.stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                with contextlib.suppress(HybridSDError):  # being replaced, perhaps
                    self._token = _read(self._path)
            return self._token


def check_token(token: str) -> str:
    """Returns a token that can be sent.

    Raises:
        InvalidRequest: FIELD_INVALID if it cannot.
    """
    if not (token.isascii() and token.isprintable()):
        raise Reason.FIELD_INVALID.error(
            "the token has line breaks or characters beyond ASCII; give one line, as the server's operator did",
            field="token",
        )
    return token


def _read(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(f"cannot read {path}: {error}", field="token_file") from error
    if not token:
        raise Reason.FIELD_INVALID.error(
            f"{path} is empty; write the token into it that the server's operator gave", field="token_file"
        )
    return check_token(token)
