"""The clouds' capabilities, polled."""

import asyncio
import time
from typing import Any

import structlog

from edge_client.cloud.pool import Pool
from edge_client.cloud.types import Capabilities as CloudCapabilities
from edge_client.web.errors import in_words
from hybridsd.errors import HybridSDError

log = structlog.get_logger()

POLL_INTERVAL_S = 3.0
"""An answer of the cloud is used for this long."""
POLL_TIMEOUT_S = 2.0
"""How long a client waits for a new answer: a cloud that drops packets must not block the page."""


class CloudWatch:
    """Polls all clouds, at most every `POLL_INTERVAL_S` seconds for all clients together."""

    def __init__(self, cloud: Pool | None) -> None:
        self._cloud = cloud
        self._task: asyncio.Task[None] | None = None
        self._polled_s = -POLL_INTERVAL_S
        self._capabilities: CloudCapabilities | None = None
        self._lost: frozenset[str] = frozenset()
        self._message = "no cloud is configured; set the operator's --server" if cloud is None else "not asked yet"

    @property
    def known(self) -> CloudCapabilities | None:
        """The cloud's last answer, without asking again; None if it did not answer."""
        return self._capabilities

    @property
    def each(self) -> list[dict[str, Any]]:
        """What is known of each cloud, as a `schemas.native.OneCloud`."""
        members = () if self._cloud is None else self._cloud.members()
        return [
            {
                "target": member.target,
                "reachable": (found := member.found) is not None,
                "message": None if member.error is None else in_words(member.error.message),
                "models": [model.id for model in found.models] if found else [],
                "num_running": found.num_running if found else 0,
                "num_queued": found.num_queued if found else 0,
            }
            for member in members
        ]

    def health(self) -> list[tuple[str, bool, bool]]:
        """Returns each cloud's target, whether it answered when last asked, and whether it is left alone for now."""
        if self._cloud is None:
            return []
        return [
            (member.target, member.found is not None, member.cloud.breaker.is_tripped)
            for member in self._cloud.members()
        ]

    async def poll(self, wait_s: float = POLL_TIMEOUT_S) -> tuple[CloudCapabilities | None, str | None]:
        """Returns what the clouds can do together; None and the reason where it cannot be reached.

        Args:
            wait_s: How long to wait for a new answer. After that the last one is returned.
        """
        is_due = self._task is None and time.monotonic() - self._polled_s >= POLL_INTERVAL_S
        if self._cloud is not None and is_due:
            self._task = asyncio.create_task(self._ask(self._cloud))
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=wait_s)
        return self._capabilities, None if self._capabilities is not None else self._message

    async def _ask(self, cloud: Pool) -> None:
        try:
            self._capabilities = await asyncio.to_thread(cloud.capabilities)
        except HybridSDError as error:
            self._capabilities, self._message = None, in_words(error.message)
        finally:
            self._log_changes(cloud)
            self._polled_s, self._task = time.monotonic(), None

    def _log_changes(self, cloud: Pool) -> None:
        """Logs once that a cloud is lost, and why, and once that it is back."""
        members = cloud.members()
        lost = frozenset(member.target for member in members if member.error is not None and member.found is None)
        for member in members:
            if member.error is not None and member.target in lost - self._lost:
                log.warning(
                    "cloud_lost", server=member.target, reason=member.error.reason.name, message=member.error.message
                )
            elif member.target in self._lost - lost:
                log.info("cloud_back", server=member.target)
        self._lost = lost
