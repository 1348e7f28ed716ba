"""Who may call: a file of named tokens, hashed at rest, that cloud and gateway read alike.

The file is TOML, one table a token:

    [alice]
    sha256 = "..."                    # of the token, in hex; the token itself is nowhere
    scopes = ["generate"]             # any of SCOPES; this one where the line is missing
    expires = 2027-01-31T00:00:00Z    # never where the line is missing
    weight = 2                        # of its share of the machine, above 0; 1 where the line is missing

    [alice.quota]                     # each line may be missing: no limit
    jobs = 4                          # that run at once
    queued = 16                       # that wait
    steps_per_minute = 600            # of the U-Net, a guided one counts once
    pixels = 1048576                  # of one image
    bytes = 1073741824                # of images that a gateway keeps

A file without tables is a list of tokens, one a line, as plain text; lines with # are comments. Its tokens are named
token-1, token-2 and so on, and have the scopes generate and metrics.
"""

import hashlib
import os
import re
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCOPES = ("generate", "priority", "metrics", "admin")
"""generate: ask for images. priority: before those without it. metrics: read /metrics. admin: see and stop all jobs."""
USER_KEY = "x-hybridsd-user"
"""Name of the metadata, or header, in which a gateway says for whom of its callers it asks."""
MAX_USER_CHARS = 64
RELOAD_S = 1.0
"""A file is looked at for changes at most this often."""
PREFIX = "hsd_"
"""Of tokens that are made here, so that secret scanners find them."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TABLE = re.compile(r"^\s*\[", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """Limits of one token; None is no limit."""

    jobs: int | None = None
    """That run at once."""
    queued: int | None = None
    """That wait."""
    steps_per_minute: int | None = None
    pixels: int | None = None
    """Of one image, width times height."""
    bytes: int | None = None
    """Of the images that a gateway keeps."""


NO_QUOTA = Quota()


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """What the file says of a token."""

    name: str
    sha256: bytes = field(repr=False)
    """32 bytes."""
    scopes: frozenset[str] = frozenset({"generate"})
    expires: datetime | None = None
    weight: float = 1.0
    quota: Quota = NO_QUOTA
    is_named: bool = True
    """Whether the file names it: the lines of a plain one are only counted."""

    def has_expired(self, now: datetime | None = None) -> bool:
        """Whether it is not good any more."""
        return self.expires is not None and (now or datetime.now(UTC)) >= self.expires


def hash_token(token: str) -> bytes:
    """Returns the SHA-256 of a token, 32 bytes. Tokens are random, so that a slow hash would protect nothing more."""
    return hashlib.sha256(token.encode()).digest()


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Returns the tokens of a file's text.

    Raises:
        ValueError: With what is wrong and what is allowed.
    """
    if not _TABLE.search(text):
        return _plain(text)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    tokens = tuple(_token(name, table) for name, table in tables.items())
    if len({token.sha256 for token in tokens}) < len(tokens):
        raise ValueError("two names have one token; give each its own")
    return tokens


def _plain(text: str) -> tuple[Token, ...]:
    lines = [line.strip() for line in text.splitlines()]
    values = [line for line in lines if line and not line.startswith("#")]
    if any(not (value.isascii() and value.isprintable()) for value in values):
        raise ValueError("a token has characters that cannot be sent; give printable ASCII, one token a line")
    if not values:
        raise ValueError("it has no tokens; give one a line, or tables made with `tokens add`")
    scopes = frozenset({"generate", "metrics"})
    return tuple(
        Token(name=f"token-{index}", sha256=hash_token(value), scopes=scopes, is_named=False)
        for index, value in enumerate(dict.fromkeys(values), 1)
    )


def _token(name: str, table: Any) -> Token:
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} stands outside of a table; begin one with [NAME]")
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name {name[:80]!r} is not 1 to 64 characters of A-Z a-z 0-9 _ -")
    if unknown := sorted(set(table) - {"sha256", "scopes", "expires", "weight", "quota"}):
        raise ValueError(f"[{name}] has {unknown[0]!r}; it may have sha256, scopes, expires, weight and [{name}.quota]")
    digest, scopes, expires = table.get("sha256", ""), table.get("scopes", ["generate"]), table.get("expires")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"sha256 of [{name}] is not 64 hexadecimal digits; make a token with `tokens add`")
    if not isinstance(scopes, list) or any(scope not in SCOPES for scope in scopes):
        raise ValueError(f"scopes of [{name}] are {scopes!r}; choose of {', '.join(SCOPES)}")
    if expires is not None and not isinstance(expires, datetime):
        raise ValueError(f"expires of [{name}] is {expires!r}; give a time as 2027-01-31T00:00:00Z")
    if expires is not None and expires.tzinfo is None:
        expires = expires.replace(tzinfo=UTC)
    weight = table.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1000:
        raise ValueError(f"weight of [{name}] is {weight!r}; choose above 0, at most 1000")
    return Token(
        name=name, sha256=bytes.fromhex(digest), scopes=frozenset(scopes), expires=expires, weight=float(weight),
        quota=_quota(name, table.get("quota", {})),
    )  # fmt: skip


def _quota(name: str, table: Any) -> Quota:
    known = [each.name for each in fields(Quota)]
    if not isinstance(table, Mapping) or (set(table) - set(known)):
        raise ValueError(f"[{name}.quota] may have {', '.join(known)}, not {', '.join(map(str, table))[:80]}")
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key} of [{name}.quota] is {value!r}; give a whole number from 0 on, or leave it out")
    return Quota(**table)


class Tokens:
    """The tokens of a file, which is read again when it changes. Safe to use from several threads."""

    def __init__(self, path: Path, *, on_reload: Callable[[str | None], None] | None = None) -> None:
        """Reads the file.

        Args:
            path: Of the file.
            on_reload: Called after each later reading: with None, or with what is wrong; then the tokens of before
                stay good.

        Raises:
            ValueError: If it cannot be read, with what is wrong.
        """
        self._path, self._on_reload = path, on_reload
        self._lock = threading.Lock()
        self._looked_s = time.monotonic()
        self._stamp = _stamp(path)
        self._tokens = _read(path)

    @classmethod
    def of(cls, tokens: Sequence[str]) -> "Tokens":
        """Returns given tokens, as a plain file has them."""
        self = cls.__new__(cls)
        self._path, self._on_reload, self._lock = Path(), None, threading.Lock()
        self._looked_s, self._stamp = float("inf"), None
        self._tokens = _by_digest(_plain("\n".join(tokens)))
        return self

    @property
    def all(self) -> tuple[Token, ...]:
        """All of them, also expired ones."""
        self._reload()
        return tuple(self._tokens.values())

    def find(self, token: str) -> Token | None:
        """Returns what is known of a token; None if it is not known. It may have expired.

        The digest is looked up, so that the time that this takes says nothing of tokens.
        """
        self._reload()
        return self._tokens.get(hash_token(token))

    def _reload(self) -> None:
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s < RELOAD_S:
                return
            self._looked_s = now_s
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp, wrong = stamp, None
            try:
                self._tokens = _read(self._path)
            except ValueError as error:
                wrong = str(error)
        if self._on_reload is not None:
            self._on_reload(wrong)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _read(path: Path) -> dict[bytes, Token]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    try:
        return _by_digest(parse_tokens(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _by_digest(tokens: Sequence[Token]) -> dict[bytes, Token]:
    return {token.sha256: token for token in tokens}


def add_token(path: Path, name: str, **values: Any) -> str:
    """Adds a new token to a file, which is made where there is none, readable by its owner alone.

    Args:
        path: Of the file.
        name: Of the token.
        **values: Further fields of `Token`: scopes, expires, weight, quota.

    Returns:
        The token, which cannot be found out from the file.

    Raises:
        ValueError: If the name is taken or a value out of range, or the file has plain tokens.
    """
    tokens = _tables(path)
    if any(token.name == name for token in tokens):
        raise ValueError(f"{path} has a token {name!r} already; choose another name, or remove it first")
    secret = PREFIX + secrets.token_urlsafe(32)
    _write(path, [*tokens, Token(name=name, sha256=hash_token(secret), **values)])
    return secret


def remove_token(path: Path, name: str) -> None:
    """Removes a token from a file.

    Raises:
        ValueError: If there is none of that name.
    """
    tokens = _tables(path)
    if all(token.name != name for token in tokens):
        raise ValueError(f"{path} has no token {name!r}; it has {', '.join(token.name for token in tokens) or 'none'}")
    _write(path, [token for token in tokens if token.name != name])


def _tables(path: Path) -> tuple[Token, ...]:
    if not path.exists():
        return ()
    text = path.read_text(encoding="utf-8")
    if text.strip() and not _TABLE.search(text):
        raise ValueError(f"{path} has plain tokens; choose another file for named ones")
    return parse_tokens(text) if text.strip() else ()


def _write(path: Path, tokens: Sequence[Token]) -> None:
    """Writes a file whole, after its text was read back: readers see the old or the new one."""
    text = "".join(map(_table, tokens))
    parse_tokens(text or "#\n[a]\nsha256 = '" + "0" * 64 + "'")
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)


def _table(token: Token) -> str:
    quota = {each.name: getattr(token.quota, each.name) for each in fields(Quota)}
    lines = [f"[{token.name}]", f'sha256 = "{token.sha256.hex()}"']
    lines.append("scopes = [" + ", ".join(f'"{scope}"' for scope in SCOPES if scope in token.scopes) + "]")
    if token.expires is not None:
        lines.append(f"expires = {token.expires.astimezone(UTC).isoformat(timespec='seconds').replace('+00:00', 'Z')}")
    if token.weight != 1:
        lines.append(f"weight = {token.weight:g}")
    if limits := [f"{key} = {value}" for key, value in quota.items() if value is not None]:
        lines += [f"[{token.name}.quota]", *limits]
    return "\n".join(lines) + "\n\n"
