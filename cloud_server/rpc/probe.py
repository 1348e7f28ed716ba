"""How commands reach a server, and ask whether it serves. Knows gRPC's health protocol, and whom to trust."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud_server.settings import is_loopback
from hybridsd import certificates


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """How a server is spoken to; plain text where all is empty."""

    tls: bool = False
    """Speak TLS. On this machine any certificate is good, where nothing below says which."""
    tls_ca: Path | None = None
    tls_fingerprint: str | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("--client-cert and --client-key go together; give both or none")
        if self.tls_ca is not None and self.tls_fingerprint is not None:
            raise ValueError("--tls-ca and --tls-fingerprint both say which certificate is good; give one")

    @property
    def is_plain(self) -> bool:
        """Whether TLS is not spoken."""
        return not (self.tls or self.tls_ca or self.tls_fingerprint or self.client_cert)


def ask(server: str, timeout_s: float, trust: Trust) -> str:
    """Returns what a server says of its health, such as SERVING.

    Args:
        server: host:port.
        timeout_s: Of each of three parts: connection, handshake, question.
        trust: How it is spoken to.

    Raises:
        ValueError: If an option is wrong.
        OSError: If it does not answer, or shows another certificate.
    """
    with open_channel(server, timeout_s, trust) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # typed as if it had no methods
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s).status
        except grpc.RpcError as error:
            raise OSError(error.code().name) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def say_away(server: str, why: str, trust: Trust) -> str:
    """Returns why a server does not answer and what to do, for whoever typed a command.

    Args:
        server: host:port.
        why: As `ask` raises it, or the name of gRPC's code.
        trust: How it was spoken to.
    """
    if "WRONG_VERSION_NUMBER" in why or "RECORD_LAYER_FAILURE" in why:
        return f"{server} does not speak TLS; leave out --tls and the other options of certificates"
    hint = ""
    if why == grpc.StatusCode.UNAVAILABLE.name and trust.is_plain:
        hint = ", or give --tls if it speaks TLS"
    elif why == grpc.StatusCode.UNAVAILABLE.name and trust.client_cert is None:
        hint = ", or give --client-cert and --client-key if it asks for them"
    return f"{server} does not answer ({why}); look at its log{hint}"


def open_channel(server: str, timeout_s: float, trust: Trust) -> grpc.Channel:
    """Returns a channel to host:port; arguments and errors as of `ask`."""
    host, _, port = server.rpartition(":")
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)] if is_loopback(host) or trust.is_plain else []
    if trust.is_plain:
        return grpc.insecure_channel(server, options=options)
    client = None if trust.client_cert is None or trust.client_key is None else (trust.client_cert, trust.client_key)
    authority: bytes | None = None
    if client is not None:
        certificates.check_pair(*client, labels=("--client-cert", "--client-key"))
    if trust.tls_ca is not None:
        certificates.check_authorities(trust.tls_ca, label="--tls-ca")
        authority = trust.tls_ca.read_bytes()
    elif trust.tls_fingerprint is not None or is_loopback(host):
        pin = None if trust.tls_fingerprint is None else _read_pin(trust.tls_fingerprint)
        if not (port.isascii() and port.isdigit()):
            raise ValueError(f"--server is {server[:100]!r}; give host:port, as in 127.0.0.1:50051")
        shown = certificates.fetch(host, int(port), timeout_s, client=client)
        if pin is not None and not certificates.is_pinned(shown, pin):
            found = certificates.show(certificates.fingerprint(shown))
            raise OSError(f"its certificate has the fingerprint {found}, not {certificates.show(pin)}")
        authority = shown.encode()
        options.append(("grpc.ssl_target_name_override", certificates.name_to_expect(shown, host)))
    key, chain = (None, None) if client is None else (client[1].read_bytes(), client[0].read_bytes())
    return grpc.secure_channel(server, grpc.ssl_channel_credentials(authority, key, chain), options=options)


def _read_pin(text: str) -> bytes:
    try:
        return certificates.read_fingerprint(text)
    except ValueError as error:
        raise ValueError(f"--tls-fingerprint: {error}") from error
