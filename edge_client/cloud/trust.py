"""How the link to a server is secured: whose certificate is good, and what this device shows of itself."""

import socket
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from edge_client.addresses import is_loopback
from edge_client.cloud.connection import read_ca, read_target
from edge_client.cloud.names import join_target
from hybridsd import certificates
from hybridsd.errors import HybridSDError, Reason

import grpc  # isort: skip  # after `connection`, which quietens it

RETRY_DELAY_S = 0.1
"""After a certificate was found to be renewed, as pinned."""


class Trust:
    """What one server's certificate must be. Thread-safe.

    gRPC cannot compare fingerprints. So a pinned server is asked for its certificate first; if that is the right one,
    it is the only authority of the channel, and the handshake of the channel shows that the server has its key. A
    certificate that is renewed later fails there, and is compared again.

    Args:
        target: "host:port".
        address: One address of the host, where it has several; the certificate is that of the host.
        tls_ca: PEM file of the authority that signed the server's certificate.
        tls_fingerprints: SHA-256 of certificates of which the server must show one, in hexadecimal digits.
        client_cert: Certificate chain that this device shows, PEM.
        client_key: Its key.
        insecure: Allows plain text to a host that is not this one. TLS is used anyway where anything above is given.
        timeout_s: How long the server may take to show its certificate.

    Raises:
        InvalidRequest: FIELD_INVALID for what cannot be used.
    """

    def __init__(
        self,
        target: str,
        *,
        address: str | None = None,
        tls_ca: Path | None = None,
        tls_fingerprints: Sequence[str] = (),
        client_cert: Path | None = None,
        client_key: Path | None = None,
        insecure: bool = False,
        timeout_s: float,
    ) -> None:
        self.target, self._timeout_s = target, timeout_s
        self._host, self._port = read_target(target)
        self._address = address
        self._where = target if address is None else join_target(address, self._port)
        self._ca_file = tls_ca
        if tls_ca is not None and tls_fingerprints:
            raise Reason.FIELD_INVALID.error(
                "`tls_ca` and `tls_fingerprint` both say which certificate is good; give one", field="tls_fingerprint"
            )
        try:
            self._pins = tuple(map(certificates.read_fingerprint, tls_fingerprints))
        except ValueError as error:
            raise Reason.FIELD_INVALID.error(f"`tls_fingerprint`: {error}", field="tls_fingerprint") from error
        if (client_cert is None) != (client_key is None):
            raise Reason.FIELD_INVALID.error(
                "`client_cert` and `client_key` go together; give both or none", field="client_cert"
            )
        self._client = None if client_cert is None or client_key is None else (client_cert, client_key)
        asked = tls_ca is not None or self._pins or self._client is not None
        self.encrypted = bool(asked) or not (insecure or is_loopback(self._host))
        self._lock = threading.Lock()
        self._asking: Future[str] | None = None
        self._pinned: str | None = None
        self._files = [path for path in (tls_ca, client_cert, client_key) if path is not None]
        self._stamps = self._look()
        self._authorities, self._pair = self._read_files()

    @property
    def is_ready(self) -> bool:
        """Whether a channel can be made without asking the server first."""
        return not self._pins or self._pinned is not None

    def prepare(self) -> None:
        """Makes a channel possible: asks a pinned server for its certificate, once.

        Raises:
            AccessDenied: If it shows another.
            CloudUnreachable: If it does not answer; caused by a TimeoutError if it is silent.
        """
        if self.is_ready:
            return
        shown = self._ask()
        if not self._adopt(shown):
            raise self._wrong_pin(shown)

    def channel(self, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Returns a new channel; of a pinned server only after `prepare`.

        Raises:
            AccessDenied: If the pinned certificate names nobody.
        """
        if not self.encrypted:
            return grpc.insecure_channel(self._where, options=options)
        chain, key = self._pair
        if self._pinned is None:
            credentials = grpc.ssl_channel_credentials(self._authorities, key, chain)
            by_name = [] if self._address is None else [("grpc.ssl_target_name_override", self._host)]
            return grpc.secure_channel(self._where, credentials, options=[*options, *by_name])
        try:
            name = certificates.name_to_expect(self._pinned, self._host)
        except ValueError as error:
            raise Reason.UNAUTHENTICATED.error(
                f"the certificate of {self.target} cannot be used: {error}; make another there"
            ) from error
        credentials = grpc.ssl_channel_credentials(self._pinned.encode(), key, chain)
        named = [*options, ("grpc.ssl_target_name_override", name), ("grpc.enable_http_proxy", 0)]
        return grpc.secure_channel(self._where, credentials, options=named)

    def reload(self) -> bool:
        """Whether the files have changed, and are good: then a new channel goes by what they hold now."""
        if not self._files:
            return False
        with self._lock:
            stamps = self._look()
            if stamps == self._stamps:
                return False
            self._stamps = stamps
            try:
                self._authorities, self._pair = self._read_files()
            except HybridSDError:  # being replaced, perhaps; what was read before stays good
                return False
            return True

    def describe(self) -> str:
        """Returns in a few words how the link is secured."""
        if not self.encrypted:
            return "plain text"
        shows = "" if self._client is None else f", this device shows {self._client[0]}"
        if self._pins:
            pins = " or ".join(map(certificates.show, self._pins))
            return f"encrypted, certificate pinned to {pins}{shows}"
        by = "the system's authorities" if self._ca_file is None else str(self._ca_file)
        return f"encrypted, certificate checked against {by}{shows}"

    def refusal(self, why: str) -> HybridSDError:
        """Returns the exception for a certificate that gRPC found to be wrong, after a look at what is shown now.

        Args:
            why: In gRPC's words; may be empty.
        """
        try:
            shown = self._ask()
        except HybridSDError:
            shown = None
        if self._pins and shown is not None and not self._is_pinned(shown):
            return self._wrong_pin(shown)
        if self._pins and shown is not None and self._pinned != shown:
            self._adopt(shown)
            return Reason.UNAVAILABLE.error(
                f"the certificate of {self.target} was renewed, as pinned; try again", retry_delay_s=RETRY_DELAY_S
            )
        if self._pins:
            return Reason.UNAUTHENTICATED.error(
                f"the certificate of {self.target} is the pinned one, but is not accepted ({why or 'no reason given'});"
                " make another there, and set its `tls_fingerprint`"
            )
        found = "" if shown is None else f" {certificates.show(certificates.fingerprint(shown))}"
        return Reason.UNAUTHENTICATED.error(
            f"the certificate of {self.target} is not trusted ({why or 'it cannot be verified'}); give the file of "
            "the authority that signed it as `tls_ca`, and the host that it names as `server`, or pin it: compare "
            f"its fingerprint{found} with what `hybridsd-cloud fingerprint` prints there, and set `tls_fingerprint`"
        )

    def _is_pinned(self, shown: str) -> bool:
        return any(certificates.is_pinned(shown, pin) for pin in self._pins)

    def _adopt(self, shown: str) -> bool:
        is_right = self._is_pinned(shown)
        if is_right:
            self._pinned = shown
        return is_right

    def _wrong_pin(self, shown: str) -> HybridSDError:
        found = certificates.show(certificates.fingerprint(shown))
        pins = " or ".join(map(certificates.show, self._pins))
        return Reason.UNAUTHENTICATED.error(
            f"the certificate of {self.target} has the fingerprint {found}, not {pins}; compare with what "
            "`hybridsd-cloud fingerprint` prints there: if it was renewed, set its `tls_fingerprint`, else somebody is "
            "in between"
        )

    def _ask(self) -> str:
        """Returns the certificate that the server shows now; who comes meanwhile waits for the same answer."""
        with self._lock:
            asking = self._asking
            if asking is None:
                asking = self._asking = Future()
                threading.Thread(target=self._fetch, args=(asking,), daemon=True).start()
        try:
            return asking.result(self._timeout_s)
        except TimeoutError as error:
            what = f"does not show a certificate within {self._timeout_s:g} s"
            raise no_connection(self.target, what, ", or give another `server`") from error
        except ssl.SSLError as error:
            if "WRONG_VERSION" in str(error) or "RECORD" in str(error):
                hint = ", or set `insecure` to speak to it in plain text, without `tls_fingerprint`"
                raise no_connection(self.target, "does not speak TLS", hint) from error
            raise no_connection(self.target, f"breaks TLS off ({error.reason or error})", "") from error
        except socket.gaierror as error:
            raise no_connection(self.target, "is unknown", "") from error
        except ConnectionRefusedError as error:
            raise no_connection(self.target, "refuses connections", "") from error
        except (OSError, ValueError) as error:
            raise no_connection(self.target, f"cannot be reached ({error})", "") from error

    def _fetch(self, asking: "Future[str]") -> None:
        """Runs on a thread of its own, since looking up a name may take as long as it likes."""
        outcome: str | BaseException
        try:
            outcome = certificates.fetch(self._address or self._host, self._port, self._timeout_s, client=self._client)
        except BaseException as error:
            outcome = error
        with self._lock:
            self._asking = None
        if isinstance(outcome, str):
            asking.set_result(outcome)
        else:
            asking.set_exception(outcome)

    def _look(self) -> tuple[object, ...]:
        return tuple(map(certificates.stamp, self._files))

    def _read_files(self) -> tuple[bytes | None, tuple[bytes | None, bytes | None]]:
        """Returns the authorities, and the chain and key of this device."""
        authorities = read_ca(self._ca_file)
        if self._client is None:
            return authorities, (None, None)
        try:
            certificates.check_pair(*self._client)
            return authorities, (self._client[0].read_bytes(), self._client[1].read_bytes())
        except (OSError, ValueError) as error:
            raise Reason.FIELD_INVALID.error(
                f"`client_cert` and `client_key` cannot be used: {error}", field="client_cert"
            ) from error


def no_connection(target: str, what: str, hint: str) -> HybridSDError:
    """Returns the exception for a server that cannot be spoken to.

    Args:
        target: The server.
        what: It does.
        hint: What else to try, after a comma.
    """
    return Reason.UNAVAILABLE.error(
        f"{target} {what}; check that `hybridsd-cloud serve` runs there{hint}, or set `mode` to edge"
    )
