"""A caller who waits for a job and goes away: nobody wants the job any more."""

import asyncio
import contextlib

from fastapi import Request

from edge_client.web.gateway import Gateway
from edge_client.web.jobs.store import StoredJob
from hybridsd.errors import Reason, WrongState

LOOK_S = 0.25
"""How often it is looked whether the caller is still there."""


async def finished_or_gone(request: Request, gateway: Gateway, job: StoredJob) -> StoredJob:
    """Waits for the end of a job that a caller waits for; cancels it when the caller goes away.

    Raises:
        Cancelled: CANCELLED when the caller is gone.
    """
    waiting = asyncio.ensure_future(gateway.queue.finished(job))
    try:
        while True:
            done, _ = await asyncio.wait((waiting,), timeout=LOOK_S)
            if done:
                return waiting.result()
            if await request.is_disconnected():
                raise Reason.CANCELLED.error(f"the caller of job {job.id} is gone, so it was cancelled")
    finally:
        if not waiting.done():
            waiting.cancel()
            with contextlib.suppress(WrongState):
                gateway.queue.cancel(job)


def succeeded(job: StoredJob) -> StoredJob:
    """Returns a job that was completed.

    Raises:
        HybridSDError: What it failed with; Cancelled where somebody cancelled it.
    """
    if job.error is not None:
        reason = Reason[str(job.error["reason"])]
        raise reason.error(job.error["detail"], field=job.error["field"], retry_delay_s=job.error["retry_delay_s"])
    if job.state == "cancelled":
        raise Reason.CANCELLED.error(f"job {job.id} was cancelled")
    if job.state != "completed":
        raise Reason.INTERNAL.error(f"job {job.id} could not be kept; the gateway's log says why")
    return job
