"""Access to the gateway: who asks, what they may, and signed URLs of images."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import time
from dataclasses import dataclass, field
from datetime import datetime

from fastapi import Request

from hybridsd.errors import Reason
from hybridsd.tokens import NO_QUOTA, Quota, Token, Tokens

KEY_S = 24 * 3600
"""How long a signed address is valid at least."""
KEY_STEP_S = 3600
"""Addresses that are signed within this time are equal, so that browsers keep their images."""
_OPEN_SCOPES = frozenset({"generate", "metrics"})
"""What everybody may where no token is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """A client. Two are equal if they have the same jobs and the same address."""

    owner: str
    """Owner of its jobs: the name of its token, or a hash of one without a name; empty where no token is needed."""
    host: str
    """Its address, which separates users of AUTOMATIC1111's API: requests there have no ids."""
    user: str = field(default="", compare=False)
    """Whose share its jobs take: a short id of its owner, or without tokens of its address, that tells neither."""
    scopes: frozenset[str] = field(default=_OPEN_SCOPES, compare=False)
    expires: datetime | None = field(default=None, compare=False)
    weight: float = field(default=1.0, compare=False)
    quota: Quota = field(default=NO_QUOTA, compare=False)

    @property
    def is_admin(self) -> bool:
        """Whether it may see and stop all jobs."""
        return "admin" in self.scopes

    @property
    def has_priority(self) -> bool:
        """Whether its jobs come before those of others."""
        return "priority" in self.scopes

    def check(self, *scopes: str) -> "Caller":
        """Returns the caller if it has one of these scopes.

        Raises:
            AccessDenied: PERMISSION_DENIED.
        """
        if self.scopes.isdisjoint(scopes):
            wanted = " or ".join(repr(scope) for scope in scopes)
            raise Reason.PERMISSION_DENIED.error(
                f"the token lacks the scope {wanted}, it has {', '.join(sorted(self.scopes)) or 'none'}; "
                "ask the operator for a token with it"
            )
        return self


class Access:
    """Checks tokens and signs URLs.

    Args:
        tokens: Those who have one see only the jobs created with it. None: everybody has access.
        secret: Signs the URLs of images, and makes ids of users that tell nothing.
    """

    def __init__(self, tokens: Tokens | None, secret: bytes) -> None:
        self._tokens, self._secret = tokens, secret

    @property
    def is_open(self) -> bool:
        """Whether no token is needed."""
        return self._tokens is None

    def caller(self, request: Request) -> Caller:
        """Returns the client of a request.

        Raises:
            AccessDenied: UNAUTHENTICATED.
        """
        host = request.client.host if request.client else ""
        if self._tokens is None:
            return Caller(owner="", host=host, user=self._user(f"address {_network(host)}"))
        given = _given_token(request.headers.get("authorization", ""))
        token = self._tokens.find(given)
        if token is None:
            what = "wrong" if given else "missing"
            raise Reason.UNAUTHENTICATED.error(
                f"the token is {what}; send 'Authorization: Bearer TOKEN' with a token of the operator",
            )
        if token.has_expired():
            raise Reason.UNAUTHENTICATED.error(
                f"the token {token.name!r} expired at {token.expires:%Y-%m-%d %H:%M %Z}; ask the operator for a new one"
            )
        return self._caller_with(token, _owner(token, given), host)

    def require(self, request: Request, *scopes: str) -> Caller:
        """Returns the client of a request, which has one of these scopes.

        Raises:
            AccessDenied: UNAUTHENTICATED; PERMISSION_DENIED, with the scope's name.
        """
        return self.caller(request).check(*scopes)

    def caller_of(self, owner: str, user: str = "") -> Caller:
        """Returns the client whose job is kept, with what its token may now; after that was removed, without limits.

        Args:
            owner: Of the job.
            user: Of the job.
        """
        named = self._tokens.all if self._tokens is not None and owner else ()
        for token in named:
            if token.name == owner and not token.is_plain:
                return self._caller_with(token, owner, "")
        return Caller(owner=owner, host="", user=user or self._user(f"owner {owner}"))

    def token_name(self, owner: str) -> str:
        """Returns the name of an owner's token: none where there are no tokens, unnamed where it has no name."""
        if self._tokens is None or not owner:
            return "none"
        return owner if any(not token.is_plain and token.name == owner for token in self._tokens.all) else "unnamed"

    def _caller_with(self, token: Token, owner: str, host: str) -> Caller:
        return Caller(
            owner=owner, host=host, user=self._user(f"owner {owner}"), scopes=token.scopes, expires=token.expires,
            weight=token.weight, quota=token.quota,
        )  # fmt: skip

    def _user(self, who: str) -> str:
        return hmac.new(self._secret, f"user {who}".encode(), hashlib.sha256).hexdigest()[:16]

    def sign(self, path: str) -> str:
        """Returns the key that gives access to a path without a token for `KEY_S`, and up to `KEY_STEP_S` longer."""
        until = (int(time.time()) // KEY_STEP_S + 1) * KEY_STEP_S + KEY_S
        return f"{until}-{self._mac(path, until)}"

    def reader(self, request: Request, key: str) -> Caller | None:
        """Returns the client of a request for what may have a signed address; None if its key gives access.

        Raises:
            AccessDenied: UNAUTHENTICATED; PERMISSION_DENIED.
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
        return self.require(request, "generate", "admin")

    def _mac(self, path: str, until: int) -> str:
        return hmac.new(self._secret, f"{path} {until}".encode(), hashlib.sha256).hexdigest()[:32]


def _owner(token: Token, given: str) -> str:
    """Returns the name of a token, so that a new secret keeps its jobs; of one without a name a hash."""
    return hashlib.sha256(b"owner" + given.encode()).hexdigest()[:16] if token.is_plain else token.name


def _network(host: str) -> str:
    """Returns what of an address one client has: of IPv6 64 bits, since it may choose the others itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _given_token(header: str) -> str:
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
