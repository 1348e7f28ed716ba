"""Connections of clients: whoever does not send a request is not waited for."""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
"""How long the head of a request may take."""
MAX_HEADLESS = 512
"""Connections without a whole head at once; beyond it the oldest is closed."""
_headless: dict["PatientProtocol", None] = {}
"""The oldest first."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for the heads of requests, and for what comes of bodies that nobody reads any more."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_timer()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Starts the timer where no request is being answered. More of the same head does not start it anew."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._give_up)
            _headless[self] = None
            if len(_headless) > MAX_HEADLESS:
                next(iter(_headless))._give_up()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        _headless.pop(self, None)

    def _give_up(self) -> None:
        self._stop_timer()
        self.transport.abort()


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """Returns how the gateway is served.

    Args:
        app: The gateway.
        options: Of uvicorn.
    """
    return uvicorn.Config(app, http=PatientProtocol, ws="none", access_log=False, server_header=False, **options)
