"""A process that is asked to load, and does what the environment says instead. It imports little, to be quick."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection

HANG_S = 3600.0
"""Longer than any test."""


def main() -> None:
    """Takes the order, then does it."""
    connection = Connection(int(sys.argv[1]))
    connection.recv_bytes()
    match os.environ["TEST_LOADING"]:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "ends":
            sys.exit(3)
        case "hangs":
            time.sleep(HANG_S)


if __name__ == "__main__":
    main()
