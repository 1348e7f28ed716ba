"""Webhooks: calls a URL with each finished job. Only hosts that the operator allows are called."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import structlog

from edge_client.web.jobs.store import Store, StoredJob
from hybridsd.errors import CloudUnreachable, Reason

log = structlog.get_logger()

TRIES = 4
TIMEOUT_S = 10.0


class Webhooks:
    """Sends finished jobs to their webhooks.

    Args:
        hosts: Allowed hosts, as host or host:port.
        store: Remembers which webhooks are done.
        view: Returns the JSON to send.
        first_delay_s: Seconds before the second attempt; doubled before each further one.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        store: Store,
        view: Callable[[StoredJob], dict[str, Any]],
        first_delay_s: float = 1.0,
    ) -> None:
        self._hosts, self._store, self._view, self._first_delay_s = frozenset(hosts), store, view, first_delay_s

    def check(self, url: str | None) -> None:
        """Checks a webhook URL.

        Raises:
            InvalidRequest: FIELD_INVALID if it is not an http or https URL.
            AccessDenied: PERMISSION_DENIED if its host is not allowed.
        """
        if url is None:
            return
        try:
            parts = urlsplit(url)
            host, netloc, scheme = parts.hostname or "", parts.netloc.rpartition("@")[2], parts.scheme
        except ValueError:
            host = netloc = scheme = ""
        if scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
            raise Reason.FIELD_INVALID.error(f"webhook is {url[:80]!r}; give an http or https URL", field="webhook")
        if host not in self._hosts and netloc not in self._hosts:
            raise Reason.PERMISSION_DENIED.error(
                f"webhook host {netloc[:80]!r} is not allowed; the operator allows it with --webhook-host",
                field="webhook",
            )

    async def send(self, job: StoredJob) -> None:
        """Calls the webhook of a finished job, if it has one. The next start repeats interrupted attempts."""
        url, delay_s = job.request.get("webhook"), self._first_delay_s
        if not url:
            return
        # without redirects, which could leave the allowed hosts
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            for attempt in range(TRIES):
                try:
                    answer = await client.post(url, json=self._view(job), headers={"X-HybridSD-Job": job.id})
                    answer.raise_for_status()
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    log.warning("webhook_failed", job=job.id, attempt=attempt + 1, error=str(error)[:200])
                    if attempt < TRIES - 1:
                        await asyncio.sleep(delay_s)
                        delay_s *= 2
                else:
                    break
        with contextlib.suppress(CloudUnreachable):  # a shared database is lost; it is called once more
            await self._store.run(self._store.finish_webhook, job.id)
