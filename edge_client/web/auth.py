"""Access to the gateway: tokens and signed URLs of images."""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from hybridsd.errors import Reason

KEY_S = 24 * 3600
"""How long a signed address is valid at least."""
KEY_STEP_S = 3600
"""Addresses that are signed within this time are equal, so that browsers keep their images."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A client."""

    owner: str
    """Owner of its jobs, a hash of the token; empty where no token is needed."""
    host: str
    """Its address, which separates users of AUTOMATIC1111's API: requests there have no ids."""


class Access:
    """Checks tokens and signs URLs.

    Args:
        tokens: One for each user, who sees only the jobs created with it. Without tokens everybody has access.
        secret: Signs the URLs of images.
    """

    def __init__(self, tokens: Sequence[str], secret: bytes) -> None:
        self._owners = {hashlib.sha256(token.encode()).digest(): _owner(token) for token in tokens}
        self._secret = secret

    @property
    def is_open(self) -> bool:
        """Whether no token is needed."""
        return not self._owners

    def caller(self, request: Request) -> Caller:
        """Returns the client of a request.

        Raises:
            AccessDenied: UNAUTHENTICATED.
        """
        host = request.client.host if request.client else ""
        if self.is_open:
            return Caller("", host)
        token = _token(request.headers.get("authorization", ""))
        owner = self._owners.get(hashlib.sha256(token.encode()).digest())  # hashes, so that timing reveals nothing
        if owner is None:
            what = "wrong" if token else "missing"
            raise Reason.UNAUTHENTICATED.error(
                f"the token is {what}; send 'Authorization: Bearer TOKEN' with a token of the operator",
            )
        return Caller(owner, host)

    def sign(self, path: str) -> str:
        """Returns the key that gives access to a path without a token for `KEY_S`, and up to `KEY_STEP_S` longer."""
        until = (int(time.time()) // KEY_STEP_S + 1) * KEY_STEP_S + KEY_S
        return f"{until}-{self._mac(path, until)}"

    def reader(self, request: Request, key: str) -> Caller | None:
        """Returns the client of a request for what may have a signed address; None if its key gives access.

        Raises:
            AccessDenied: UNAUTHENTICATED.
        """
        until, _, mac = key.partition("-")
        is_own = (
            until.isascii()
            and until.isdigit()
            and len(until) <= 12
            and hmac.compare_digest(self._mac(request.url.path, int(until)).encode(), mac.encode())
        )
        if is_own and int(until) >= time.time():
            return None
        if is_own and not self.is_open and "authorization" not in request.headers:
            raise Reason.UNAUTHENTICATED.error(
                "this address has expired; read the job again for a new one, or send a token"
            )
        return self.caller(request)

    def _mac(self, path: str, until: int) -> str:
        return hmac.new(self._secret, f"{path} {until}".encode(), hashlib.sha256).hexdigest()[:32]


def read_tokens(path: Path | None) -> list[str]:
    """Returns the tokens in a file, one per line.

    Raises:
        InvalidRequest: FIELD_INVALID if the file cannot be read, has no token, or has one that HTTP cannot send.
    """
    if path is None:
        return []
    try:
        tokens = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(f"cannot read {path}: {error}", field="client_tokens") from error
    if not tokens or any(not (token.isascii() and token.isprintable()) for token in tokens):
        raise Reason.FIELD_INVALID.error(
            f"{path} must have one token per line, in printable ASCII; change `client_tokens`",
            field="client_tokens",
        )
    return tokens


def _owner(token: str) -> str:
    return hashlib.sha256(b"owner" + token.encode()).hexdigest()[:16]


def _token(header: str) -> str:
    """Returns the token of a Bearer header, or the password of a Basic header as AUTOMATIC1111's clients send it."""
    scheme, _, value = header.partition(" ")
    if scheme.casefold() == "bearer":
        return value.strip()
    if scheme.casefold() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
