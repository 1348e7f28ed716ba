"""The process that loads one model, or changes the adapters of one, and hands it over; see `loading`.

It has a lower priority than the server, one thread and no GPU. Run as `python -m`, with two open files and niceness.
"""

import contextlib
import logging
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog


def main() -> None:
    """Does one order."""
    os.nice(int(sys.argv[3]))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, this process goes, not the server
    connection, file = Connection(int(sys.argv[1])), int(sys.argv[2])
    _log_to(connection)
    from cloud_server.models import loading

    loading.end_with_server()
    loading.serve_order(connection, file, _work)


def _work(order: Any, connection: Connection, file: int) -> Any:
    import torch

    from cloud_server import logs
    from cloud_server.models.devices import Placement
    from cloud_server.models.handover import pack, unpack, write_shared
    from cloud_server.models.load import change_adapters
    from cloud_server.models.loading import LoadOrder

    logs.quiet_libraries()
    torch.set_num_threads(1)
    cpu, numbers = torch.device("cpu"), dict[int, int]()
    if isinstance(order, LoadOrder):
        _send(connection, "described", order.spec.describe(order.dtype))
        connection.recv_bytes()  # to go on
        model = order.spec.load(Placement(cpu, "to be handed over", order.dtype, "as the others"))
    else:
        model = unpack(order.skeleton, None, cpu, numbers=numbers)
        model = change_adapters(model, order.add, order.remove)
    skeleton, tensors = pack(model, numbers)
    return skeleton, write_shared(file, tensors)


def _log_to(connection: Connection) -> None:
    """Sends log lines to the server, which writes them."""

    def send(_logger: Any, method: str, event: dict[str, Any]) -> Any:
        level = logging.getLevelNamesMapping().get(method.upper(), logging.INFO)
        if level >= logging.INFO:
            _send(connection, "log", {**{key: str(value) for key, value in event.items()}, "level": level})
        raise structlog.DropEvent

    processors: list[Any] = [send]
    structlog.configure(processors=processors)


def _send(connection: Connection, kind: str, content: Any) -> None:
    import pickle

    connection.send_bytes(pickle.dumps((kind, content)))


if __name__ == "__main__":
    main()
