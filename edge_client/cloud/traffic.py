"""Bytes that arrive before a message is whole: what tells a slow link from a silent peer.

gRPC hands out whole messages only, so the kernel is asked: Linux counts the bytes of every TCP connection.
"""

import os
import socket
import stat
import struct

MIN_BYTES_PER_S = 500
"""The slowest link that is waited for: each byte of a message on its way buys its time at this rate."""
ASSUMED_BYTES_PER_S = 1250
MAX_ASSUMED_S = 60.0
"""Where nobody counts bytes, the largest message to come may take its time at this rate, but no longer than this."""
_BYTES_RECEIVED_AT = 128  # of `tcpi_bytes_received` in Linux' struct tcp_info, since 4.1
_FOLDER = "/proc/self/fd"


def count_bytes(port: int) -> int | None:
    """Returns the bytes received so far over TCP connections of this process to a port; None where nobody counts."""
    try:
        names = os.listdir(_FOLDER)
    except OSError:
        return None
    found = [count for name in names if (count := _count(int(name), port)) is not None]
    return sum(found) if found else None


def bought_s(before: int | None, now: int | None, expected_bytes: int) -> float:
    """Returns the time that a message on its way may take beyond a limit.

    Args:
        before: Of `count_bytes`, when the last message had come.
        now: The same now.
        expected_bytes: Of the largest message to come; more does not buy more.
    """
    if before is None or now is None:
        return min(expected_bytes / ASSUMED_BYTES_PER_S, MAX_ASSUMED_S)
    return min(max(now - before, 0), expected_bytes) / MIN_BYTES_PER_S


def _count(fd: int, port: int) -> int | None:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        copy = os.dup(fd)  # ours to close: the descriptor itself may be closed, and its number used again, at any time
    except OSError:
        return None
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    with connection:
        try:
            if connection.type != socket.SOCK_STREAM or connection.getpeername()[1] != port:
                return None
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED_AT + 8)
            return int(struct.unpack_from("<Q", info, _BYTES_RECEIVED_AT)[0])
        except (OSError, AttributeError, IndexError, TypeError, struct.error):  # of another kind, or another system
            return None
