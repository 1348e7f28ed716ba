"""How commands call a running server: their options, the connection, what is said when it fails."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from cloud_server.settings import is_loopback
from hybridsd.errors import name_fields

F = TypeVar("F", bound=Callable[..., Any])
TIMEOUT_S = 10.0
_WORDS = {"owner": "--token", "id": "ID", "name": "NAME"}
"""What the commands call a field that a message of the server names, where it is not an option of that name."""
_PREFIX = "HYBRIDSD_CLOUD_"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("--server", default="127.0.0.1:50051", show_default=True, envvar=f"{_PREFIX}SERVER", show_envvar=True,
                 help="The server, as host:port."),
    click.option("--token-file", type=_FILE, help="File with the token to call with, as plain text; "
                 f"{_PREFIX}TOKEN holds the token itself. What is others' needs one with the scope admin."),
    click.option("--tls", is_flag=True, help="Speak TLS; on this machine, any certificate is good."),
    click.option("--tls-ca", type=_FILE, envvar=f"{_PREFIX}TLS_CA", show_envvar=True,
                 help="Speak TLS; PEM file of the authority of its certificate."),
    click.option("--tls-fingerprint", metavar="SHA256", help="Speak TLS; the certificate has this fingerprint."),
    click.option("--client-cert", type=_FILE, help="Certificate to show, PEM, where the server asks for one."),
    click.option("--client-key", type=_FILE, help="Its private key, PEM."),
    click.option("--insecure", is_flag=True, help="Send the token in plain text beyond this machine."),
)  # fmt: skip


def connection(command: F) -> F:
    """Adds the options of a command that calls a running server; `calling` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@contextmanager
def calling(
    server: str, *, token_file: Path | None, insecure: bool, timeout_s: float = TIMEOUT_S, **trust: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields a channel and the options of each call; says what fails, and exits.

    Args:
        server: As host:port.
        token_file: With the token to call with.
        insecure: Whether a token may go in plain text.
        timeout_s: Of each call.
        **trust: See `cloud_server.rpc.probe.Trust`.
    """
    import grpc  # takes a while; --help must not

    from cloud_server.rpc.probe import Trust, open_channel, say_away

    token = _token(token_file)
    try:
        trusted = Trust(**trust)
        if token and trusted.is_plain and not insecure and not is_loopback(server.rpartition(":")[0]):
            raise ValueError(
                f"the token would go to {server} in plain text; give --tls, --tls-ca, --tls-fingerprint or --insecure"
            )
        channel = open_channel(server, TIMEOUT_S, trusted)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        click.echo(f"Error: {say_away(server, str(error), trusted)}", err=True)
        sys.exit(4)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with channel:
        try:
            yield channel, {"timeout": timeout_s, "metadata": metadata}
        except grpc.RpcError as error:
            is_away = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            said: Any = error.trailing_metadata() or ()
            is_said = any(key == "grpc-status-details-bin" for key, _ in said)
            what = error.details() if is_said or not is_away else say_away(server, error.code().name, trusted)
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                what = f"{what}; give the right one with --token-file, or {_PREFIX}TOKEN"
            what = name_fields(what or "", lambda field: _WORDS.get(field, f"--{field.replace('_', '-')}"))
            click.echo(f"Error: {what}", err=True)
            sys.exit(4 if is_away else 3)


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows, the first being the heading, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _token(path: Path | None) -> str:
    if path is None:
        return os.environ.get(f"{_PREFIX}TOKEN", "").strip()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--token-file {path} cannot be read: {error}") from error
    if not token.isascii() or not token.isprintable() or not token:
        raise click.UsageError(f"--token-file {path} has not one token alone; give a file with the token to call with")
    return token
