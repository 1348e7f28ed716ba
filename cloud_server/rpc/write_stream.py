"""Writes the messages of a stream, for as long as somebody reads them."""

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message

from hybridsd.errors import Reason

UNREAD_S = 30.0
"""A reader that takes nothing for so long, its window full, is gone."""


async def write(context: "grpc.aio.ServicerContext[Any, Any]", message: Message) -> None:
    """Writes a message of a stream.

    Raises:
        HybridSDError: CANCELLED if the reader is gone.
    """
    try:
        async with asyncio.timeout(UNREAD_S):
            await context.write(message)
    except TimeoutError:
        raise Reason.CANCELLED.error(f"nobody has read the stream for {UNREAD_S:g} s") from None
