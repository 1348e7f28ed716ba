"""Channels to one server: how they are made, checked and replaced."""

import contextlib
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what its core would log, the errors of calls say; read at the import

import grpc

from hybridsd.errors import Reason
from hybridsd.v1 import bundle_service_pb2_grpc, denoising_service_pb2_grpc


def read_target(target: str) -> tuple[str, int]:
    """Returns the host and the port of "host:port".

    Raises:
        InvalidRequest: FIELD_INVALID if it is something else.
    """
    plain = target.removeprefix("dns:///")
    if "://" in plain:
        raise Reason.FIELD_INVALID.error(
            f"`server` is {target[:200]!r}, which is a URL; give host:port, as in 127.0.0.1:50051", field="server"
        )
    host, colon, port = plain.rpartition(":")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise Reason.FIELD_INVALID.error(
            f"`server` is {target[:200]!r}; give an IPv6 address in brackets, as in [::1]:50051", field="server"
        )
    if not (colon and host and port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise Reason.FIELD_INVALID.error(
            f"`server` is {target[:200]!r}; give host:port, as in 127.0.0.1:50051", field="server"
        )
    return host, int(port)


def read_ca(path: Path | None) -> bytes | None:
    """Returns the authorities of a PEM file; None without one.

    Raises:
        InvalidRequest: FIELD_INVALID if it cannot be read, or holds no certificates.
    """
    if path is None:
        return None
    try:
        content = path.read_bytes()
        ssl.create_default_context(cadata=content.decode("ascii"))
    except OSError as error:
        if not isinstance(error, ssl.SSLError):
            raise Reason.FIELD_INVALID.error(f"cannot read {path}: {error.strerror}", field="tls_ca") from error
        content = b""
    except ValueError:
        content = b""
    if not content.strip():
        raise Reason.FIELD_INVALID.error(
            f"{path} holds no certificate in PEM form; `tls_ca` is the file of the authority that signed the server's "
            "certificate",
            field="tls_ca",
        )
    return content


class Connection:
    """A channel and its stubs."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.denoising = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
        self.bundles = bundle_service_pb2_grpc.BundleServiceStub(channel)
        self.num_users = 0


class Connections:
    """The current connection to a server; one to a silent peer is replaced, and closed after its last call.

    Args:
        make: Makes a channel, with a TCP connection of its own. It does not wait.
        prepare: Called before the first; may wait, and raise what the call that needs it then raises.
    """

    def __init__(self, make: Callable[[], grpc.Channel], *, prepare: Callable[[], None] = lambda: None) -> None:
        self._make, self._prepare, self._lock = make, prepare, threading.Lock()
        self._current: Connection | None = None
        self._all: set[Connection] = set()

    @contextlib.contextmanager
    def use(self) -> Iterator[Connection]:
        """Lends the current one for a call."""
        connection = self.take()
        try:
            yield connection
        finally:
            self.put_back(connection)
            self._close_unused()

    def take(self) -> Connection:
        """Lends the current one until it is put back; the first is made for whoever comes first."""
        self._prepare()
        with self._lock:
            if self._current is None:
                self._current = self._open()
            self._current.num_users += 1
            return self._current

    def put_back(self, connection: Connection) -> None:
        """Ends a loan; closes nothing, so that it may be called from gRPC's own threads."""
        with self._lock:
            connection.num_users -= 1

    def replace(self, silent: Connection | None = None) -> None:
        """Opens another in the place of one whose peer is silent, unless that was done already; None is the current."""
        with self._lock:
            if self._current is not None and (silent is None or self._current is silent):
                self._current = self._open()
        self._close_unused()

    def close(self) -> None:
        """Ends all of them, and every call on them."""
        for connection in tuple(self._all):
            connection.channel.close()

    def _open(self) -> Connection:
        connection = Connection(self._make())
        self._all.add(connection)
        return connection

    def _close_unused(self) -> None:
        with self._lock:
            unused = {each for each in self._all if each is not self._current and each.num_users == 0}
            self._all -= unused
        for connection in unused:
            connection.channel.close()
