"""Writes the messages of a stream, for as long as somebody reads them."""

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message

from hybridsd.errors import Reason

UNREAD_S = 120.0
"""A reader that does not make room for the next message for so long is gone; 1 MiB at 9 kB/s takes as long."""


async def write(context: "grpc.aio.ServicerContext[Any, Any]", message: Message) -> None:
    """Writes a message of a stream.

    Raises:
        HybridSDError: UNAVAILABLE if the reader is gone; should it come back, it can go on.
    """
    try:
        async with asyncio.timeout(UNREAD_S):
            await context.write(message)
    except TimeoutError:
        raise Reason.UNAVAILABLE.error(
            f"nobody has read this stream for {UNREAD_S:g} s; ask again for the rest"
        ) from None
