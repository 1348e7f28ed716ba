"""One gateway per data folder: two would run the same jobs."""

import os
import socket
import sqlite3
import time
from pathlib import Path

from hybridsd.errors import Reason


class FolderLock:
    """Holds a folder until it is closed, or the process ends in whatever way.

    Args:
        folder: A folder.

    Raises:
        InvalidRequest: FIELD_INVALID if another process holds it; says which one.
        OSError: It cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        holder = folder / "holder"
        try:  # SQLite knows how to lock a file on every system
            self._connection = connection = sqlite3.connect(
                folder / "lock", timeout=0, isolation_level=None, check_same_thread=False
            )
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
                raise OSError(f"cannot lock it: {error}") from error
            connection.close()
            who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
            raise Reason.FIELD_INVALID.error(
                f"{folder} is used by another gateway ({who}); end it, or change `data_dir`", field="data_dir"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", encoding="utf-8")

    def close(self) -> None:
        """Lets others have the folder."""
        self._connection.close()
