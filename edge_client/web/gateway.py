"""Everything that the faces share: the queue, the store, who may come in, what edge and cloud can do."""

import asyncio
import importlib.metadata
import time
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.types import Capabilities as CloudCapabilities
from edge_client.inference.models import Models
from edge_client.web.auth import Access, Caller
from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.uploads import take
from edge_client.web.jobs.view import Views
from edge_client.web.jobs.webhooks import Webhooks
from edge_client.web.schemas.native import MAX_IMAGES, JobCreate
from hybridsd import schedulers
from hybridsd.errors import HybridSDError
from hybridsd.limits import MAX_GUIDANCE, MAX_PROMPT_CHARS, MAX_SEED, MAX_SIZE, MAX_STEPS, MIN_GUIDANCE

LOOK_S = 3.0
"""For how long an answer of the cloud about itself is taken for new."""
WAIT_S = 2.0
"""How long a client waits for a new answer: a cloud that drops packets must not hold up the page."""


class CloudWatch:
    """What the cloud says of itself, asked at most every `LOOK_S` seconds, however many want to know."""

    def __init__(self, cloud: Cloud | None) -> None:
        self._cloud = cloud
        self._looking: asyncio.Task[None] | None = None
        self._asked_s = -LOOK_S
        self._found: CloudCapabilities | None = None
        self._message = "no cloud is configured; start the gateway with --server" if cloud is None else "not asked yet"

    async def look(self, wait_s: float = WAIT_S) -> tuple[CloudCapabilities | None, str | None]:
        """Returns what was found; None with the reason where it is away.

        Args:
            wait_s: For how long to wait for a new answer, before the last one is good enough.
        """
        is_due = self._looking is None and time.monotonic() - self._asked_s >= LOOK_S
        if self._cloud is not None and is_due:
            self._looking = asyncio.create_task(self._ask(self._cloud))
        if self._looking is not None:
            await asyncio.wait((self._looking,), timeout=wait_s)
        return self._found, None if self._found is not None else self._message

    async def _ask(self, cloud: Cloud) -> None:
        try:
            self._found = await asyncio.to_thread(cloud.capabilities)
        except HybridSDError as error:
            self._found, self._message = None, error.message
        finally:
            self._asked_s, self._looking = time.monotonic(), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gateway:
    """What a request handler gets."""

    bundle: Bundle
    models: Models
    cloud: Cloud | None
    watch: CloudWatch
    store: Store
    queue: JobQueue
    access: Access
    views: Views
    webhooks: Webhooks
    max_body_bytes: int

    async def submit(self, create: JobCreate, caller: Caller, face: str) -> StoredJob:
        """Takes a job in.

        Raises:
            HybridSDError: What is wrong with it, or TOO_MANY_JOBS.
        """
        self.webhooks.check(create.webhook)
        create, upload = await asyncio.to_thread(take, create)
        return await self.queue.submit(create, upload, owner=caller.owner, face=face)

    def view(self, job: StoredJob) -> dict[str, Any]:
        """Returns what clients see of a job now."""
        return self.views.job(job, self.queue.position(job.id))

    async def capabilities(self) -> dict[str, Any]:
        """Returns a `schemas.Capabilities`."""
        manifest, defaults = self.bundle.manifest, self.bundle.manifest.defaults
        found, message = await self.watch.look()
        offline: dict[str, list[int]] = {}
        for name in self.bundle.plan_names():
            scheduler, _, steps = name.partition("/")
            offline.setdefault(scheduler, []).append(int(steps))
        return {
            "version": importlib.metadata.version("hybridsd"),
            "edge": {
                "model": manifest.name,
                "latent_space": manifest.latent_space,
                "provider": self.models.choice.describe(),
                "size_multiple": manifest.size_multiple,
                "sizes": list(manifest.sizes),
                "max_size": MAX_SIZE,
                "offline": [{"scheduler": name, "steps": sorted(steps)} for name, steps in offline.items()],
                "guidance": manifest.guidance,
                "has_image_encoder": "vae_encoder" in manifest.files,
                "has_safety_checker": self.models.has_safety_checker,
            },
            "cloud": {
                "configured": self.cloud is not None,
                "reachable": found is not None,
                "target": "" if self.cloud is None else self.cloud.target,
                "message": message,
                "models": [
                    {
                        "id": model.id, "guidance": model.guidance, "loras": list(model.loras),
                        "schedulers": list(model.schedulers),
                    }
                    for model in (found.models if found else ())
                    if model.latent_space == manifest.latent_space
                ],
                "num_running": found.num_running if found else 0,
                "num_queued": found.num_queued if found else 0,
                "step_s": found.call_s if found else 0.0,
            },
            "defaults": {
                "scheduler": schedulers.find(defaults.scheduler).name,
                "num_inference_steps": defaults.num_inference_steps,
                "cloud_steps": defaults.cloud_steps,
                "guidance_scale": defaults.guidance_scale,
                "width": defaults.width,
                "height": defaults.height,
            },
            "schedulers": [
                {"name": spec.name, "label": spec.aliases[0] if spec.aliases else spec.name}
                for spec in schedulers.SCHEDULERS
            ],
            "limits": {
                "max_prompt_chars": MAX_PROMPT_CHARS, "max_n": MAX_IMAGES, "max_steps": MAX_STEPS,
                "max_seed": MAX_SEED, "min_guidance": MIN_GUIDANCE, "max_guidance": MAX_GUIDANCE,
                "max_body_bytes": self.max_body_bytes, "max_queue": self.queue.max_waiting,
            },
            "quality": [
                {
                    "metric": point.metric, "num_inference_steps": point.num_inference_steps,
                    "cloud_steps": point.cloud_steps, "value": point.value,
                }
                for point in manifest.quality
            ],
            "queue": self.queue.load,
        }  # fmt: skip


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


SharedGateway = Annotated[Gateway, Depends(_gateway)]
