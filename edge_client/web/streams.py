"""Streams of events, and how many of them a client may have open. `connections` ends those that nobody reads."""

from collections import Counter
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, JSONServerSentEvent
from starlette.types import Receive, Scope, Send

from edge_client.web.auth import Caller
from hybridsd.errors import Reason

MAX_STREAMS = 256
"""Of one token, or without tokens of one address, behind which there may be many users; a browser opens 6."""
KEEP_ALIVE_S = 10


class Streams:
    """The open streams of each client."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @property
    def num_open(self) -> int:
        """How many are open, of all clients."""
        return self._open.total()

    def respond(self, caller: Caller, events: AsyncIterator[JSONServerSentEvent]) -> EventSourceResponse:
        """Returns a response of events.

        Raises:
            CloudBusy: TOO_MANY_JOBS when the client has `MAX_STREAMS` open.
        """
        client = caller.user
        if self._open[client] >= MAX_STREAMS:
            raise Reason.TOO_MANY_JOBS.error(
                f"{MAX_STREAMS} streams of events are open, which is the limit; close some, or read the job instead",
                retry_delay_s=1.0,
            )
        return _Stream(events, self._open, client)


class _Stream(EventSourceResponse):
    def __init__(self, events: AsyncIterator[JSONServerSentEvent], opened: Counter[str], client: str) -> None:
        super().__init__(events, ping=KEEP_ALIVE_S, headers={"X-Accel-Buffering": "no"})
        self._opened, self._owner = opened, client
        opened[client] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._opened[self._owner] -= 1
            if not self._opened[self._owner]:
                del self._opened[self._owner]
