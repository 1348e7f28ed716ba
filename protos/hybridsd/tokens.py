"""Who may call: a file of named tokens, hashed at rest, that cloud and gateway read alike.

The file is TOML, one table a token:

    [alice]
    sha256 = "..."                    # of the token, in hex; the token itself is nowhere
    scopes = ["generate"]             # any of SCOPES; this one where the line is missing
    expires = 2027-01-31T00:00:00Z    # never where the line is missing
    weight = 2                        # of its share of the machine, above 0; 1 where the line is missing

    [alice.quota]                     # each line may be missing: no limit
    jobs = 4                          # that run at once, from 1
    queued = 16                       # that wait, from 0
    steps_per_minute = 600            # of the U-Net, a guided one counts once, from 1
    pixels = 1048576                  # of one image, from 1
    bytes = 1073741824                # of images that a gateway keeps, from 0

A file without tables is a list of tokens, one a line, as plain text; lines with # are comments. Its tokens are named
token-1, token-2 and so on, and have the scopes generate and metrics. A file made here begins with HEADER, and may have
no tables: nobody may call then.
"""

import hashlib
import os
import re
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
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
HEADER = "# Tokens of Hybrid SD, hashed. Change them with `tokens add` and `tokens remove`."
"""The first line of a file that is made here."""
MAX_LIMIT = 2**53 - 1
"""Of each number of a quota."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TABLE = re.compile(r"^\s*\[", re.MULTILINE)
_LEAST = {"queued": 0, "bytes": 0}
"""Least values of a quota that are not 1."""
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


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
    is_plain: bool = False
    """Whether it stands as plain text in the file, without a name of its own."""

    @property
    def owner(self) -> str:
        """Whose its jobs are: the name goes on to own them when its token changes; a plain token has but itself."""
        return self.sha256.hex() if self.is_plain else self.name

    def has_expired(self, now: datetime | None = None) -> bool:
        """Whether it is not good any more."""
        return self.expires is not None and (now or datetime.now(UTC)) >= self.expires


def hash_token(token: str) -> bytes:
    """Returns the SHA-256 of a token, 32 bytes. Tokens are random, so that a slow hash would protect nothing more."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Returns the tokens of a file's text.

    Raises:
        ValueError: With what is wrong and what is allowed.
    """
    if not _has_tables(text):
        return _plain(text)
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no TOML: {error}") from None
    tokens = tuple(_token(name, table) for name, table in tables.items())
    if len({token.sha256 for token in tokens}) < len(tokens):
        raise ValueError("two names have one token; give each its own")
    return tokens


def _has_tables(text: str) -> bool:
    return text.startswith(HEADER) or _TABLE.search(text) is not None


def _plain(text: str) -> tuple[Token, ...]:
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1)}
    lines = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    values = list(lines.values())
    for number, value in lines.items():
        if not (value.isascii() and value.isprintable()):
            raise ValueError(
                f"the token of line {number} has characters that cannot be sent; give printable ASCII, one token a line"
            )
    if any(re.match(r"sha256\s*=", value) for value in values):
        raise ValueError("sha256 stands outside of a table; begin one with [NAME]")  # and is no token to call with
    if not values:
        raise ValueError("it is empty, and has no tokens; give one a line, or tables made with `tokens add`")
    scopes = frozenset({"generate", "metrics"})
    return tuple(
        Token(name=f"token-{index}", sha256=hash_token(value), scopes=scopes, is_plain=True)
        for index, value in enumerate(dict.fromkeys(values), 1)
    )


def _token(name: str, table: Any) -> Token:
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} stands outside of a table; begin one with [NAME]")
    _check_name(name)
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


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name {name[:80]!r} is not 1 to 64 characters of A-Z a-z 0-9 _ -")


def _quota(name: str, table: Any) -> Quota:
    known = [each.name for each in fields(Quota)]
    if not isinstance(table, Mapping) or (set(table) - set(known)):
        raise ValueError(f"[{name}.quota] may have {', '.join(known)}, not {', '.join(map(str, table))[:80]}")
    for key, value in table.items():
        least = _LEAST.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_LIMIT:
            raise ValueError(
                f"{key} of [{name}.quota] is {value!r}; give a whole number from {least} on, or leave it out"
            )
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
        self.reload()
        return tuple(self._tokens.values())

    def find(self, token: str) -> Token | None:
        """Returns what is known of a token; None if it is not known. It may have expired.

        The digest is looked up, so that the time that this takes says nothing of tokens.
        """
        self.reload()
        return self._tokens.get(hash_token(token))

    def reload(self) -> None:
        """Reads the file again if it has changed; every use does so, too, but a change is said when it is seen."""
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
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        return _by_digest(parse_tokens(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _by_digest(tokens: Sequence[Token]) -> dict[bytes, Token]:
    return {token.sha256: token for token in tokens}


def parse_expiry(text: str, *, now: datetime | None = None) -> datetime | None:
    """Returns when a token expires; None for never.

    Args:
        text: "never", a span such as 90d (also m, h, w), a date, or a time as 2027-01-31T00:00:00Z; UTC where it does
            not say.
        now: From when a span counts; None is now.

    Raises:
        ValueError: With what is wrong and what is allowed.
    """
    now, text = now or datetime.now(UTC), text.strip()
    if text == "never":
        return None
    try:
        if span := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
            until = now + timedelta(seconds=int(span[1]) * _UNITS_S[span[2]])
        else:
            until = datetime.fromisoformat(text)
            until = until.replace(tzinfo=UTC) if until.tzinfo is None else until.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text[:64]!r} is no time; give a span such as 90d, a date such as 2027-01-31, or never"
        ) from None
    if until <= now:
        raise ValueError(f"{text!r} is not in the future; give a later time")
    return until.replace(microsecond=0)


def list_tokens(path: Path, *, now: datetime | None = None) -> list[str]:
    """Returns what a file says of its tokens, for people: a line each, below a heading, without hashes.

    Raises:
        ValueError: If it cannot be read, with what is wrong.
    """
    rows = [("NAME", "SCOPES", "EXPIRES", "WEIGHT", "QUOTA")]
    for token in _read(path).values():
        scopes = ",".join(scope for scope in SCOPES if scope in token.scopes) or "none"
        until = "never" if token.expires is None else _time(token.expires)
        until += " (expired)" if token.has_expired(now) else ""
        limits = " ".join(f"{key}={value}" for key, value in _limits(token.quota).items())
        rows.append((token.name, scopes, until, f"{token.weight:g}", limits or "none"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def warn_of_readers(path: Path) -> str | None:
    """Returns a warning where others of the machine can read a file with plain tokens; None where all is well."""
    try:
        mode, is_plain = path.stat().st_mode, any(token.is_plain for token in _read(path).values())
    except (OSError, ValueError):
        return None
    if not is_plain or os.name != "posix" or not mode & 0o077:
        return None
    return (
        f"{path} has plain tokens and its mode is {mode & 0o777:o}: others of this machine can read them; run chmod 600"
        f" {path}, or keep hashed tokens, made with `tokens add`"
    )


def add_token(path: Path, name: str, **values: Any) -> str:
    """Adds a new token to a file, which is made where there is none, readable by its owner alone.

    Args:
        path: Of the file.
        name: Of the token.
        **values: Further fields of `Token`: scopes, expires, weight, quota.

    Returns:
        The token, which cannot be found out from the file.

    Raises:
        ValueError: If the name is taken or a value out of range, the file has plain tokens, or cannot be written.
    """
    _check_name(name)
    with _changing(path):
        tokens = _tables(path)
        if any(token.name == name for token in tokens):
            raise ValueError(f"{path} has a token {name!r} already; choose another name, or remove it first")
        secret = PREFIX + secrets.token_urlsafe(32)
        _write(path, [*tokens, Token(name=name, sha256=hash_token(secret), **values)])
    return secret


def remove_token(path: Path, name: str) -> None:
    """Removes a token from a file, which may be its last one: nobody may call then.

    Raises:
        ValueError: If there is none of that name, or the file cannot be written.
    """
    with _changing(path):
        tokens = _tables(path)
        if all(token.name != name for token in tokens):
            raise ValueError(
                f"{path} has no token {name!r}; it has {', '.join(token.name for token in tokens) or 'none'}"
            )
        _write(path, [token for token in tokens if token.name != name])


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Lets one process at a time change the files of a folder, and says what the system refuses.

    Raises:
        ValueError: For an `OSError`.
    """
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
    except OSError as error:
        raise ValueError(f"cannot change {path}: {error}") from None


def _tables(path: Path) -> tuple[Token, ...]:
    if not path.exists():
        return ()
    text = path.read_text(encoding="utf-8")
    if text.strip() and not _has_tables(text):
        raise ValueError(f"{path} has plain tokens; choose another file for named ones")
    return parse_tokens(text) if text.strip() else ()


def _write(path: Path, tokens: Sequence[Token]) -> None:
    """Writes a file whole, after its text was read back: readers see the old or the new one, with its old rights."""
    text = "\n\n".join([HEADER, *map(_table, tokens)]) + "\n"
    parse_tokens(text)
    path = path.resolve()  # of a link, what it names
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    before = path.stat() if path.exists() else None
    mode = 0o600 if before is None else before.st_mode & 0o777
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and os.name == "posix" and os.geteuid() == 0:
            os.chown(part, before.st_uid, before.st_gid)  # else the service could not read what root has changed
        part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _table(token: Token) -> str:
    lines = [f"[{token.name}]", f'sha256 = "{token.sha256.hex()}"']
    lines.append("scopes = [" + ", ".join(f'"{scope}"' for scope in SCOPES if scope in token.scopes) + "]")
    if token.expires is not None:
        lines.append(f"expires = {_time(token.expires)}")
    if token.weight != 1:
        lines.append(f"weight = {token.weight:g}")
    if limits := _limits(token.quota):
        lines += [f"[{token.name}.quota]", *(f"{key} = {value}" for key, value in limits.items())]
    return "\n".join(lines)


def _limits(quota: Quota) -> dict[str, int]:
    values = {each.name: getattr(quota, each.name) for each in fields(Quota)}
    return {key: value for key, value in values.items() if value is not None}


def _time(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
