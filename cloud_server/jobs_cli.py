"""`hybridsd-cloud jobs`: what a running server has to do, and how to stop it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from cloud_server.settings import is_loopback

F = TypeVar("F", bound=Callable[..., Any])
TIMEOUT_S = 10.0
_PREFIX = "HYBRIDSD_CLOUD_"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("--server", default="127.0.0.1:50051", show_default=True, envvar=f"{_PREFIX}SERVER", show_envvar=True,
                 help="The server, as host:port."),
    click.option("--token-file", type=_FILE, help="File with the token to call with, as plain text; "
                 f"{_PREFIX}TOKEN holds the token itself. With the scope admin it sees and stops the jobs of all."),
    click.option("--tls", is_flag=True, help="Speak TLS; on this machine, any certificate is good."),
    click.option("--tls-ca", type=_FILE, envvar=f"{_PREFIX}TLS_CA", show_envvar=True,
                 help="Speak TLS; PEM file of the authority of its certificate."),
    click.option("--tls-fingerprint", metavar="SHA256", help="Speak TLS; the certificate has this fingerprint."),
    click.option("--client-cert", type=_FILE, help="Certificate to show, PEM, where the server asks for one."),
    click.option("--client-key", type=_FILE, help="Its private key, PEM."),
    click.option("--insecure", is_flag=True, help="Send the token in plain text beyond this machine."),
)  # fmt: skip


def _connection(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group()
def jobs() -> None:
    """Lists and stops the jobs of a running server."""


@jobs.command("list")
@_connection
def list_(server: str, **connection: Any) -> None:
    """Prints the jobs that run and wait: those of the token, or of all with the scope admin."""
    with _calling(server, **connection) as (stub, pb, options):
        answer = stub.ListJobs(pb.ListJobsRequest(), **options)
    rows = [("ID", "OWNER", "USER", "MODEL", "STATE", "CALLS", "POSITION", "AGE")]
    for job in answer.jobs:
        is_running = job.state == pb.JOB_STATE_RUNNING
        rows.append((
            job.request_id, job.owner, job.user or "-", job.model, "running" if is_running else "waiting",
            f"{job.num_calls}/{job.num_calls + job.num_calls_left}", "-" if is_running else str(job.position),
            f"{job.age.seconds} s",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if answer.num_jobs > len(answer.jobs):
        click.echo(f"and {answer.num_jobs - len(answer.jobs)} more", err=True)


@jobs.command()
@click.argument("request_id")
@click.option("--owner", default="", help="Only the job of this token, where several have one of that id.")
@_connection
def cancel(request_id: str, owner: str, server: str, **connection: Any) -> None:
    """Stops a job at its next step boundary; exit code 3 if there is none of that id."""
    with _calling(server, **connection) as (stub, pb, options):
        answer = stub.CancelDenoise(pb.CancelDenoiseRequest(request_id=request_id, owner=owner), **options)
    if not answer.cancelled:
        click.echo(f"Error: no job {request_id} waits or runs that this token may stop; see `jobs list`", err=True)
        sys.exit(3)
    click.echo(f"{request_id} stops", err=True)


@contextmanager
def _calling(
    server: str, *, token_file: Path | None, insecure: bool, **trust: Any
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Yields a stub, its messages and the options of each call; says what fails, and exits."""
    import grpc  # takes a while; --help must not

    from cloud_server.rpc.probe import Trust, open_channel, say_away
    from hybridsd.v1 import denoising_service_pb2, denoising_service_pb2_grpc

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
            stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
            yield stub, denoising_service_pb2, {"timeout": TIMEOUT_S, "metadata": metadata}
        except grpc.RpcError as error:
            is_away = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            what = say_away(server, error.code().name, trusted) if is_away else error.details()
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                what = f"{what}; give the right one with --token-file, or {_PREFIX}TOKEN"
            click.echo(f"Error: {what}", err=True)
            sys.exit(4 if is_away else 3)


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
