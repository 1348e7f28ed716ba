"""The native API: jobs, their events and images, and the gateway's capabilities.

Jobs are sent as they are stored, without a look at the schema: they may be of an older version of the gateway.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response, status
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, JSONServerSentEvent

from edge_client.web.bodies import JsonRoute
from edge_client.web.capabilities import capabilities
from edge_client.web.dependencies import AnyCaller, AuthorizedCaller, JobReader, SharedGateway
from edge_client.web.errors import answers
from edge_client.web.jobs.store import UNFINISHED
from edge_client.web.jobs.view import MEDIA_TYPES
from edge_client.web.schemas.native import Capabilities, Format, Job, JobCreate, JobPage, Me, State
from hybridsd.errors import Reason

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=JsonRoute)

JobId = Annotated[str, Path(min_length=1, max_length=64)]


@router.get("/capabilities", response_model=Capabilities, responses=answers(401))
async def read_capabilities(gateway: SharedGateway, _caller: AuthorizedCaller) -> Any:
    """Returns what this device, its models and the cloud can do now."""
    return await capabilities(gateway)


@router.get("/me", response_model=Me, responses=answers(401))
async def read_me(gateway: SharedGateway, caller: AnyCaller) -> Any:
    """Returns who the caller is, what it may, and what is used of its limits."""
    return {
        "owner": caller.owner,
        "scopes": sorted(caller.scopes),
        "expires_at": None if caller.expires is None else caller.expires.timestamp(),
        "weight": caller.weight,
        "quotas": await gateway.quotas_of(caller),
    }


@router.post(
    "/jobs", response_model=Job, status_code=status.HTTP_202_ACCEPTED,
    responses=answers(401, 403, 409, 410, 413, 422, 429),
)  # fmt: skip
async def create_job(create: JobCreate, gateway: SharedGateway, caller: AuthorizedCaller) -> Response:
    """Adds a job to the queue and returns at once."""
    job = await gateway.submit(create, caller, "native")
    return JSONResponse(gateway.view(job), status.HTTP_202_ACCEPTED, headers={"Location": f"/v1/jobs/{job.id}"})


@router.get("/jobs", response_model=JobPage, responses=answers(401, 422))
async def list_jobs(
    gateway: SharedGateway,
    caller: JobReader,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(pattern=r"^\d{1,18}$", description="`next` of the previous page")] = None,
    state: Annotated[State | None, Query()] = None,
    owner: Annotated[str | None, Query(max_length=64, description="whose, for the scope admin; *: everybody's")] = None,
) -> Response:
    """Lists the caller's jobs, newest first."""
    if owner not in (None, caller.owner):
        caller.check("admin")
    whose = None if owner == "*" else caller.owner if owner is None else owner
    number = None if before is None else int(before)
    jobs = await gateway.store.run(gateway.store.page, whose, limit=limit + 1, before=number, state=state)
    more = len(jobs) > limit
    jobs = jobs[:limit]
    return JSONResponse({"jobs": [gateway.view(job) for job in jobs], "next": str(jobs[-1].number) if more else None})


@router.get("/jobs/{job_id}", response_model=Job, responses=answers(401, 404, 410, 422))
async def read_job(job_id: JobId, gateway: SharedGateway, caller: JobReader) -> Response:
    """Returns a job."""
    return JSONResponse(gateway.view(await gateway.job(job_id, caller)))


@router.delete("/jobs/{job_id}", status_code=204, responses=answers(401, 404, 409, 410, 422))
async def delete_job(job_id: JobId, gateway: SharedGateway, caller: JobReader) -> Response:
    """Deletes a finished job with its images."""
    job = await gateway.job(job_id, caller)
    if job.state in UNFINISHED:
        raise Reason.JOB_FINISHED.error(f"job {job.id} is {job.state}; cancel it first")
    await gateway.store.run(gateway.store.remove, job)
    return Response(status_code=204)


@router.post("/jobs/{job_id}/cancel", response_model=Job, responses=answers(401, 404, 409, 410, 422))
async def cancel_job(job_id: JobId, gateway: SharedGateway, caller: JobReader) -> Response:
    """Cancels a waiting or running job. A running job stops after its current step."""
    return JSONResponse(gateway.view(await gateway.queue.cancel(await gateway.job(job_id, caller))))


@router.get(
    "/jobs/{job_id}/events", response_class=EventSourceResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/JobEvent"}}}},
        **answers(401, 404, 410, 422, 429),
    },
)  # fmt: skip
async def watch_job(
    job_id: JobId,
    gateway: SharedGateway,
    caller: JobReader,
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> EventSourceResponse:
    """Streams the events of a job: queued, started, planned, waiting, step, preview, image, and its end.

    To resume after a broken connection, send the last `id` as Last-Event-ID.
    """
    after = 0
    if last_event_id is not None:
        if not (last_event_id.isascii() and last_event_id.isdigit()):
            raise Reason.FIELD_INVALID.error(
                f"Last-Event-ID is {last_event_id!r}; send the id of an event",
                field="last_event_id",
            )
        after = int(last_event_id)
    job = await gateway.job(job_id, caller)

    async def stream() -> AsyncIterator[JSONServerSentEvent]:
        async for event in gateway.queue.events(job, after):
            yield JSONServerSentEvent(event.data, event=event.name, id=str(event.number))

    return gateway.streams.respond(caller, stream())


@router.get(
    "/jobs/{job_id}/images/{index}", response_class=Response,
    responses={
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}},
        **answers(401, 404, 410, 422),
    },
)  # fmt: skip
async def read_image(
    job_id: JobId,
    index: Annotated[int, Path(ge=0, le=9)],
    request: Request,
    gateway: SharedGateway,
    wanted: Annotated[Format, Query(alias="format")] = "png",
    quality: Annotated[int, Query(ge=0, le=100)] = 95,
    max_side: Annotated[int | None, Query(ge=16, le=4096, description="pixels; a thumbnail")] = None,
    key: Annotated[str, Query(max_length=64, description="from the URL in a job; replaces the token")] = "",
    download: Annotated[Literal["0", "1"], Query()] = "0",
) -> Response:
    """Returns an image. A PNG file holds its parameters."""
    caller = gateway.access.reader(request, key)
    job = await (gateway.store.run(gateway.store.get, job_id) if caller is None else gateway.job(job_id, caller))
    content = await asyncio.to_thread(gateway.views.image, job, index, wanted, quality, max_side)
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    if download == "1":
        headers["Content-Disposition"] = f'attachment; filename="{job.id}-{index}.{wanted}"'
    return Response(content, media_type=MEDIA_TYPES[wanted], headers=headers)
