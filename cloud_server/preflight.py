"""Cheap checks before models load, which takes minutes: files, names and the port.

Knows nothing of models or gRPC. Every error names the option at fault.
"""

import errno
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from cloud_server.settings import Settings
from hybridsd.tokens import Tokens


def check(settings: Settings) -> None:
    """Refuses settings with which a server could not start.

    Raises:
        ValueError: Saying what is wrong.
    """
    if settings.port_file is not None and not settings.port_file.absolute().parent.is_dir():
        raise ValueError(f"--port-file {settings.port_file}: there is no such folder; make it")
    if settings.tls_cert is not None and settings.tls_key is not None:
        check_tls(settings.tls_cert, settings.tls_key)
    check_port(settings.host, settings.port)


def check_port(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on.

    Raises:
        ValueError: If it is taken, or is not one of this machine.
    """
    try:
        infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ValueError(f"--host {host}: {error}; choose an address of this machine") from error
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            option = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another {option}") from error


def check_tls(cert: Path, key: Path) -> None:
    """Refuses a certificate and a key that TLS cannot use.

    Raises:
        ValueError: If one is no PEM file, is encrypted, or they do not belong together.
    """

    def no_password() -> str:
        raise ValueError(f"--tls-key {key} is encrypted; give one without a password")

    for option, path, marker in (
        ("--tls-cert", cert, b"-----BEGIN CERTIFICATE"),
        ("--tls-key", key, b"PRIVATE KEY-----"),
    ):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{option} {path} cannot be read: {error.strerror}") from error
        if marker not in content:
            what = "certificate" if path is cert else "private key"
            raise ValueError(f"{option} {path} is no PEM file with a {what}; give one that begins with -----BEGIN")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"--tls-key {key} is not the key of --tls-cert {cert}; give the pair") from error
        raise ValueError(
            f"--tls-cert {cert} and --tls-key {key} cannot be used: {error.reason or error}; give a certificate chain"
            " and its key in PEM"
        ) from error


def check_ids(option: str, ids: Iterable[str]) -> None:
    """Refuses a name that is given twice.

    Raises:
        ValueError: Naming it.
    """
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{option}: the id {twice[0]} is given twice; name each with {option} ID=PATH")


def read_tokens(path: Path, *, on_reload: Callable[[str | None], None] | None = None) -> Tokens:
    """Returns the tokens of a file, which is read again when it changes.

    Args:
        path: Of the file: named tables, or plain tokens, one a line.
        on_reload: See `Tokens`.

    Raises:
        ValueError: If it cannot be read, or has a token that no caller could send.
    """
    try:
        tokens = Tokens(path, on_reload=on_reload)
        if any(token.is_plain for token in tokens.all):
            _check_words(path)
        return tokens
    except ValueError as error:
        raise ValueError(f"--token-file: {error}") from error


def _check_words(path: Path) -> None:
    """Refuses a plain token with a space: a name beside it, or two of them, would be one token that nobody sends."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if " " in line.strip() and not line.strip().startswith("#"):
            raise ValueError(f"{path}: the token of line {number} has spaces; write one token a line")
