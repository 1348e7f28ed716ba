"""Cheap checks before models load, which takes minutes: files, names and the port.

Knows nothing of models or gRPC. Every error names the option at fault.
"""

import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import structlog

from cloud_server.settings import Settings
from hybridsd import certificates
from hybridsd.tokens import Tokens

log = structlog.get_logger()


def check(settings: Settings) -> None:
    """Refuses settings with which a server could not start.

    Raises:
        ValueError: Saying what is wrong.
    """
    if settings.port_file is not None and not settings.port_file.absolute().parent.is_dir():
        raise ValueError(f"--port-file {settings.port_file}: there is no such folder; make it")
    if settings.tls_cert is not None and settings.tls_key is not None:
        check_tls(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca is not None:
        certificates.check_authorities(settings.tls_client_ca, label="--tls-client-ca")
    check_port(settings.host, settings.port)
    if settings.metrics_port is not None:
        check_port(settings.metrics_host, settings.metrics_port, prefix="--metrics-")


def check_port(host: str, port: int, *, prefix: str = "--") -> None:
    """Refuses an address that cannot be listened on.

    Raises:
        ValueError: If it is taken, or is not one of this machine.
    """
    try:
        infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ValueError(f"{prefix}host {host}: {error}; choose an address of this machine") from error
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            option = f"{prefix}host" if error.errno == errno.EADDRNOTAVAIL else f"{prefix}port"
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another {option}") from error


def provide_certificate(settings: Settings) -> Settings:
    """Returns the settings with a certificate, where TLS is used: the one that was given, or one that is made here.

    Raises:
        ValueError: If none can be kept.
    """
    if settings.tls_cert is not None or not settings.uses_tls:
        return settings
    folder = default_tls_dir() if settings.tls_dir is None else settings.tls_dir
    try:
        made = certificates.own_certificate(
            folder, certificates.names_of_this_machine((settings.host, *settings.tls_names))
        )
        named = certificates.names_of(made.path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}; choose another --tls-dir, give --tls-cert and --tls-key, or --insecure to send images in the"
            " clear"
        ) from error
    if made.replaces:
        log.warning("certificate_renewed", file=str(made.path), message="the old one was near its end; pin this one")
    if unnamed := [name for name in settings.tls_names if name not in named]:
        log.warning("certificate_lacks_names", names=unnamed, message=f"delete {made.path} to make another")
    return replace(settings, tls_cert=made.path, tls_key=made.path)


def default_tls_dir() -> Path:
    """Returns where a certificate that is made here is kept: in the folder that systemd gives, or the user's."""
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.partition(":")[0]) / "tls"
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "hybridsd-cloud" / "tls"


def check_tls(cert: Path, key: Path) -> None:
    """Refuses a certificate and a key that TLS cannot use.

    Raises:
        ValueError: If one is no PEM file, is encrypted, or they do not belong together.
    """
    certificates.check_pair(cert, key, labels=("--tls-cert", "--tls-key"))


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
