"""Connections of clients: whoever does not send a request, or does not read its answer, is not waited for."""

import asyncio
import functools
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
"""How long the head of a request may take."""
MAX_HEADLESS = 512
"""Connections without a whole head at once; beyond it the oldest is closed."""
UNREAD_S = 60.0
"""How often it is looked whether a client reads an answer that waits for it."""
MIN_READ_RATE = 1024
"""Bytes per second that it has to read."""
_headless: dict["PatientProtocol", None] = {}
"""The oldest first."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with time limits: for heads of requests, what comes of bodies that nobody reads, and unread answers.

    Closing is no help against the last: it waits until all is sent.
    """

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _unread = 0

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
        self._stop_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(UNREAD_S, self._check_reader)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._stop_reading()
        super().resume_writing()

    def _check_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if self._unread - unread < MIN_READ_RATE * UNREAD_S:
            self.transport.abort()
            return
        self._unread = unread
        self._reading = self.loop.call_later(UNREAD_S, self._check_reader)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

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


class PatientServer(uvicorn.Server):
    """Who connects and does not begin TLS is waited for as long as who sends no head, not asyncio's minute."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        loop = asyncio.get_running_loop()
        if self.config.ssl is not None:
            patient = functools.partial(loop.create_server, ssl_handshake_timeout=HEAD_S)
            loop.create_server = patient  # type: ignore[method-assign]
        await super().startup(sockets)


def server_config(
    app: FastAPI, *, tls: ssl.SSLContext | None = None, trusted_proxies: Sequence[str] = (), **options: Any
) -> uvicorn.Config:
    """Returns how the gateway is served.

    Args:
        app: The gateway.
        tls: With the certificate; None serves plain HTTP.
        trusted_proxies: Addresses and networks of proxies that are believed whom they speak for (X-Forwarded-For) and
            how (X-Forwarded-Proto).
        options: Of uvicorn.
    """
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", loop="asyncio", access_log=False, server_header=False,
        proxy_headers=bool(trusted_proxies), forwarded_allow_ips=list(trusted_proxies), **options,
    )  # fmt: skip
    if tls is not None:
        config.load()
        config.ssl = tls
    return config
