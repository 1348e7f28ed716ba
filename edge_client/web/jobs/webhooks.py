"""Tells other servers when a job has ended. Only hosts that the operator named are called. Knows httpx."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import structlog

from edge_client.web.jobs.store import Store, StoredJob
from hybridsd.errors import Reason

log = structlog.get_logger()

TRIES = 4
TIMEOUT_S = 10.0


class Webhooks:
    """Tells the ends of jobs.

    Args:
        hosts: Which may be told, as host or host:port.
        store: Where it is noted who has been told.
        view: What is sent.
        first_delay_s: Before the second try; twice as long before each further one.
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
        """Refuses what may not be told.

        Raises:
            InvalidRequest: FIELD_INVALID for what is no URL of http or https.
            AccessDenied: PERMISSION_DENIED for a host that the operator has not named.
        """
        if url is None:
            return
        try:
            parts = urlsplit(url)
            host, netloc, scheme = parts.hostname or "", parts.netloc.rpartition("@")[2], parts.scheme
        except ValueError:
            host = netloc = scheme = ""
        if scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
            raise Reason.FIELD_INVALID.error(f"webhook is {url[:80]!r}; give a URL of http or https", field="webhook")
        if host not in self._hosts and netloc not in self._hosts:
            raise Reason.PERMISSION_DENIED.error(
                f"webhook host {netloc[:80]!r} is not allowed; the operator allows it by --webhook-host",
                field="webhook",
            )

    async def tell(self, job: StoredJob) -> None:
        """Tells the end of a job, if somebody wants to know; tries several times, and again after a restart."""
        url, delay_s = job.request.get("webhook"), self._first_delay_s
        if not url:
            return
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:  # no redirects: hosts are a promise
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
        self._store.told_webhook(job.id)
