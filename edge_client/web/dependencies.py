"""What request handlers get: the gateway and the caller."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

from fastapi import Depends, Request

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.pool import Pool
from edge_client.cloud.types import Capabilities as CloudCapabilities
from edge_client.cloud.types import CloudModel
from edge_client.inference.models import Models
from edge_client.web.auth import Access, Caller
from edge_client.web.bodies import in_thread
from edge_client.web.cloud_watch import CloudWatch
from edge_client.web.jobs.check_cloud import refusal
from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.quotas import Quotas
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.uploads import split_uploads
from edge_client.web.jobs.view import Views
from edge_client.web.jobs.webhooks import Webhooks
from edge_client.web.logs import note
from edge_client.web.metrics import Metrics
from edge_client.web.schemas.native import JobCreate
from edge_client.web.streams import Streams


@dataclass(frozen=True, kw_only=True, slots=True)
class Gateway:
    """Everything that request handlers share."""

    bundle: Bundle
    models: Models
    cloud: Pool | None
    watch: CloudWatch
    store: Store
    queue: JobQueue
    access: Access
    quotas: Quotas
    views: Views
    webhooks: Webhooks
    streams: Streams
    metrics: Metrics
    max_body_bytes: int
    cloud_dollars_per_hour: float | None = None

    async def submit(self, create: JobCreate, caller: Caller, api: str) -> StoredJob:
        """Adds a job to the queue.

        Raises:
            HybridSDError: The request is invalid; TOO_MANY_JOBS, QUOTA_EXCEEDED.
        """
        self.webhooks.check(create.webhook)
        await self._check_cloud(create)
        create, upload = await in_thread(split_uploads, create)
        job = await self.queue.submit(create, upload, caller=caller, api=api)
        note(job=job.id)
        return job

    async def _check_cloud(self, create: JobCreate) -> None:
        """Refuses what the cloud is known not to do. What may have changed since its last answer is asked again."""
        is_here = self.cloud is None or not self.queue.needs_cloud(create)
        if not is_here and (create.hybrid.model or create.hybrid.segments or create.loras):
            await self.watch.poll()
        for is_last in (False, True):
            found = None if is_here else self.watch.known
            error = refusal(
                create,
                self.bundle.manifest,
                found,
                self.compatible_models(found),
                fits_size=self.queue.fits_size(create),
            )
            if error is None:
                return
            if is_here or is_last:
                raise error
            await self.watch.poll()

    def compatible_models(self, found: CloudCapabilities | None) -> list[CloudModel]:
        """Returns the cloud's models in this device's latent space."""
        models = found.models if found is not None else ()
        return [model for model in models if model.latent_space == self.bundle.manifest.latent_space]

    async def job(self, job_id: str, caller: Caller) -> StoredJob:
        """Returns a job of the caller; an admin's are all.

        Raises:
            NotFound: NOT_FOUND, also for a job of another; JOB_GONE.
        """
        job = await self.store.run(self.store.get, job_id, None if caller.is_admin else caller.owner)
        note(job=job.id)
        return job

    async def quotas_of(self, caller: Caller) -> dict[str, dict[str, int | None]]:
        """Returns the limits of a caller's token and what is used of them, by their names."""
        quota, left = caller.quota, await self.store.run(self.quotas.steps_left, caller)
        used: dict[str, int | None] = dict(self.queue.used(caller))
        if quota.steps_per_minute is not None and left is not None:
            used["steps_per_minute"] = math.ceil(quota.steps_per_minute - left)
        if quota.bytes is not None:
            used["bytes"] = await self.store.run(self.store.kept_bytes, caller.owner)
        limits = {each.name: getattr(quota, each.name) for each in fields(quota)}
        return {name: {"limit": limit, "used": used.get(name)} for name, limit in limits.items() if limit is not None}

    def view(self, job: StoredJob) -> dict[str, Any]:
        """Returns a job as clients get it, a `schemas.native.Job`."""
        return self.views.job(job, self.queue.position(job.id))


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


SharedGateway = Annotated[Gateway, Depends(_gateway)]


async def _caller(request: Request, gateway: SharedGateway) -> Caller:
    return _noted(gateway.access.caller(request), gateway)


async def _drawer(request: Request, gateway: SharedGateway) -> Caller:
    return _noted(gateway.access.require(request, "generate"), gateway)


async def _reader(request: Request, gateway: SharedGateway) -> Caller:
    return _noted(gateway.access.require(request, "generate", "admin"), gateway)


def _noted(caller: Caller, gateway: Gateway) -> Caller:
    """Returns the caller, whose token the request's line names."""
    note(token=gateway.access.token_name(caller.owner))
    return caller


AnyCaller = Annotated[Caller, Depends(_caller)]
"""Of any scope."""
AuthorizedCaller = Annotated[Caller, Depends(_drawer)]
"""Who may ask for images."""
JobReader = Annotated[Caller, Depends(_reader)]
"""Who may ask for images, or see all jobs."""
