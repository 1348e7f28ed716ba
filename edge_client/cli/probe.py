"""`hybridsd probe`: a health check that costs little, since it runs every few seconds."""

import http.client
import ssl
import threading
from urllib.parse import SplitResult, urlsplit

import click

from edge_client.addresses import is_loopback
from edge_client.cli.shared_options import CONTEXT, DEFAULT_GATEWAY, NumberRange
from hybridsd import certificates
from hybridsd.errors import HybridSDError, Reason

_MAX_BYTES = 65_536


@click.command(context_settings=CONTEXT)
@click.option("--gateway", default=DEFAULT_GATEWAY, show_default=True, help="Its address.")
@click.option(
    "--tls-fingerprint", metavar="SHA256",
    help="Take the certificate with this fingerprint, and no other. Without it, any is good on this machine, and "
    "elsewhere what the system's authorities have signed.",
)  # fmt: skip
@click.option("--timeout", type=NumberRange(0.1, 3600), default=3.0, show_default=True, help="Seconds in all.")
def probe(gateway: str, tls_fingerprint: str | None, timeout: float) -> None:
    """Asks a gateway whether it takes jobs; exit code 4 if not. For health checks."""
    outcome: list[str | HybridSDError] = []
    pin = None if tls_fingerprint is None else _read_pin(tls_fingerprint)

    def ask() -> None:
        try:
            outcome.append(_ask(gateway, timeout, pin))
        except HybridSDError as error:
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a socket's timeout would not bound the whole answer
    asking.start()
    asking.join(timeout)
    answer = outcome[0] if outcome else _away(gateway, f"nothing came in {timeout:g} s")
    if isinstance(answer, HybridSDError):
        raise answer
    click.echo(_shown(answer))


class _HTTPS(http.client.HTTPSConnection):
    """To a server whose certificate is known by its fingerprint; without one any is good."""

    def __init__(self, host: str, port: int | None, *, timeout: float, pin: bytes | None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        super().__init__(host, port, timeout=timeout, context=context)
        self._pin = pin

    def connect(self) -> None:
        """Connects, and sends nothing to a stranger."""
        super().connect()
        shown = ssl.DER_cert_to_PEM_cert(self.sock.getpeercert(binary_form=True) or b"")
        if self._pin is not None and not certificates.is_pinned(shown, self._pin):
            found = certificates.show(certificates.fingerprint(shown))
            raise OSError(f"its certificate has the fingerprint {found}, not {certificates.show(self._pin)}")


def _connect(url: SplitResult, timeout_s: float, pin: bytes | None) -> http.client.HTTPConnection:
    if not url.hostname:
        raise ValueError("no host")
    if url.scheme == "https" and (pin is not None or is_loopback(url.hostname)):
        return _HTTPS(url.hostname, url.port, timeout=timeout_s, pin=pin)
    if pin is not None:
        raise ValueError("a fingerprint is of https")
    kinds: dict[str, type[http.client.HTTPConnection]] = {
        "http": http.client.HTTPConnection, "https": http.client.HTTPSConnection,
    }  # fmt: skip
    return kinds[url.scheme](url.hostname, url.port, timeout=timeout_s)


def _read_pin(text: str) -> bytes:
    try:
        return certificates.read_fingerprint(text)
    except ValueError as error:
        raise Reason.FIELD_INVALID.error(f"`tls_fingerprint`: {error}", field="tls_fingerprint") from error


def _ask(gateway: str, timeout_s: float, pin: bytes | None) -> str:
    """Returns what /readyz says.

    Raises:
        InvalidRequest: FIELD_INVALID if the address is none.
        CloudUnreachable: If it does not answer, or says that it is not ready.
    """
    try:
        url = urlsplit(gateway)
        connection = _connect(url, timeout_s, pin)
    except (KeyError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(
            f"`gateway` is {gateway[:80]!r}; give its address, such as {DEFAULT_GATEWAY}", field="gateway"
        ) from error
    try:
        connection.request("GET", f"{url.path.rstrip('/')}/readyz")
        with connection.getresponse() as response:
            text: str = response.read(_MAX_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _away(gateway, str(error) or type(error).__name__, _scheme_hint(url, error)) from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise _away(gateway, f"it answers {response.status} {response.reason} {text[:200]}".rstrip())
    return text


def _scheme_hint(url: SplitResult, error: Exception) -> str:
    """Returns what else to try where a gateway may speak the other of HTTP and HTTPS."""
    if url.scheme == "http" and isinstance(error, http.client.RemoteDisconnected | ConnectionResetError):
        return f", or give --gateway https://{url.netloc} if it speaks HTTPS"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLCertVerificationError):
        return f", or give --gateway http://{url.netloc} if it speaks HTTP"
    if isinstance(error, ssl.SSLCertVerificationError):
        return ", or give its certificate with --tls-fingerprint"
    return ""


def _away(gateway: str, why: str, hint: str = "") -> HybridSDError:
    return Reason.UNAVAILABLE.error(f"{gateway} is not ready: {_shown(why)}; look at its log{_shown(hint)}")


def _shown(text: str) -> str:
    """Returns what a peer says without what would steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
