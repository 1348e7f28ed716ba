"""Between the worker thread and one reader: events that the reader has not seen yet.

Never blocks the worker and never grows without bound: a reader that falls behind finds the newest state only, but
always the start, the hand-off and the end. Knows nothing of models or messages.
"""

import asyncio
import contextlib
import threading

from cloud_server.engine.events import Event, Failed, Queued, Snapshot
from hybridsd.errors import Reason

MAX_STATES = 8
"""States that wait for a reader; one more, and all but the newest are dropped."""


class EventBuffer:
    """Holds what one stream has still to send. Made on the event loop that reads it; posted to from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self.num_dropped = 0

    def post(self, event: Event) -> None:
        """Adds an event. A new position replaces the old one, a newest state too many old ones."""
        with self._lock:
            if isinstance(event, Queued):
                self._events = [held for held in self._events if not isinstance(held, Queued)]
            elif isinstance(event, Snapshot):
                states = [held for held in self._events if isinstance(held, Snapshot)]
                if len(states) >= MAX_STATES:
                    self._events = [held for held in self._events if not isinstance(held, Snapshot)]
                    self.num_dropped += len(states)
            else:
                self._events = [held for held in self._events if not isinstance(held, Queued)]
            self._events.append(event)
        self._wake()

    def supersede(self) -> None:
        """Ends the stream because another one took over; what it has not sent yet, the other one sends."""
        error = Reason.SUPERSEDED.error("another call attached to the same job; read that one")
        with self._lock:
            self._events = [Failed(error)]
        self._wake()

    async def next(self, timeout_s: float) -> Event | None:
        """Returns the next event, or None when none came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._filled.wait()
        except TimeoutError:
            return None
        with self._lock:
            event = self._events.pop(0)
            if not self._events:
                self._filled.clear()
        return event

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed reads no more
            self._loop.call_soon_threadsafe(self._wake_if_filled)

    def _wake_if_filled(self) -> None:
        with self._lock:
            if self._events:
                self._filled.set()
