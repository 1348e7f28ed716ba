"""Waits for a job on behalf of a client, and cancels it when the client disconnects."""

import asyncio

from fastapi import Request

from edge_client.web.dependencies import Gateway
from edge_client.web.jobs.store import StoredJob
from hybridsd.errors import Reason

POLL_INTERVAL_S = 0.25
"""Seconds between checks whether the client is still connected."""


async def finish_job(request: Request, gateway: Gateway, job: StoredJob) -> StoredJob:
    """Waits until a job has ended; cancels it when the client disconnects.

    Raises:
        Cancelled: CANCELLED when the client has disconnected.
    """
    waiting = asyncio.ensure_future(gateway.queue.finished(job))
    try:
        while True:
            done, _ = await asyncio.wait((waiting,), timeout=POLL_INTERVAL_S)
            if done:
                return waiting.result()
            if await request.is_disconnected():
                raise Reason.CANCELLED.error(f"the client of job {job.id} disconnected, so the job was cancelled")
    finally:
        if not waiting.done():
            waiting.cancel()
            gateway.queue.abandon(job)


def require_completed(job: StoredJob) -> StoredJob:
    """Returns the job if it is completed.

    Raises:
        HybridSDError: Its error; CANCELLED if it was cancelled.
    """
    if job.error is not None:
        reason = Reason[str(job.error["reason"])]
        raise reason.error(job.error["detail"], field=job.error["field"], retry_delay_s=job.error["retry_delay_s"])
    if job.state == "cancelled":
        raise Reason.CANCELLED.error(f"job {job.id} was cancelled")
    if job.state != "completed":
        raise Reason.INTERNAL.error(f"job {job.id} could not be stored; see the gateway's log")
    return job
