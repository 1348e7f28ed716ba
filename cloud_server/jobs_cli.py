"""`hybridsd-cloud jobs`: what a running server has to do, and how to stop it."""

import sys
from typing import Any

import click

from cloud_server.calling import calling, connection, echo_table


@click.group()
def jobs() -> None:
    """Lists and stops the jobs of a running server."""


@jobs.command("list")
@connection
def list_(server: str, **options: Any) -> None:
    """Prints the jobs that run and wait: those of the token, or of all with the scope admin."""
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        answer = stub.ListJobs(pb.ListJobsRequest(), **call)
    rows = [("ID", "OWNER", "USER", "MODEL", "STATE", "CALLS", "POSITION", "AGE")]
    for job in answer.jobs:
        is_running = job.state == pb.JOB_STATE_RUNNING
        rows.append((
            job.request_id, job.owner, job.user or "-", job.model, "running" if is_running else "waiting",
            f"{job.num_calls}/{job.num_calls + job.num_calls_left}", "-" if is_running else str(job.position),
            f"{job.age.seconds} s",
        ))  # fmt: skip
    echo_table(rows)
    if answer.num_jobs > len(answer.jobs):
        click.echo(f"and {answer.num_jobs - len(answer.jobs)} more", err=True)


@jobs.command()
@click.argument("request_id")
@click.option("--owner", default="", help="Only the job of this token, where several have one of that id.")
@connection
def cancel(request_id: str, owner: str, server: str, **options: Any) -> None:
    """Stops a job at its next step boundary; exit code 3 if there is none of that id."""
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        answer = stub.CancelDenoise(pb.CancelDenoiseRequest(request_id=request_id, owner=owner), **call)
    if not answer.cancelled:
        click.echo(f"Error: no job {request_id} waits or runs that this token may stop; see `jobs list`", err=True)
        sys.exit(3)
    click.echo(f"{request_id} stops", err=True)


def _service(channel: Any) -> tuple[Any, Any]:
    from hybridsd.v1 import denoising_service_pb2, denoising_service_pb2_grpc

    return denoising_service_pb2, denoising_service_pb2_grpc.DenoisingServiceStub(channel)
