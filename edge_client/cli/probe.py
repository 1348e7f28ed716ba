"""`hybridsd probe`: a health check that costs little, since it runs every few seconds."""

import http.client
import threading
from urllib.parse import urlsplit

import click

from edge_client.cli.shared_options import CONTEXT, DEFAULT_GATEWAY, NumberRange
from hybridsd.errors import HybridSDError, Reason

_MAX_BYTES = 65_536


@click.command(context_settings=CONTEXT)
@click.option("--gateway", default=DEFAULT_GATEWAY, show_default=True, help="Its address.")
@click.option("--timeout", type=NumberRange(0.1, 3600), default=3.0, show_default=True, help="Seconds in all.")
def probe(gateway: str, timeout: float) -> None:
    """Asks a gateway whether it takes jobs; exit code 4 if not. For health checks."""
    outcome: list[str | HybridSDError] = []

    def ask() -> None:
        try:
            outcome.append(_ask(gateway, timeout))
        except HybridSDError as error:
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a socket's timeout would not bound the whole answer
    asking.start()
    asking.join(timeout)
    answer = outcome[0] if outcome else _away(gateway, f"nothing came in {timeout:g} s")
    if isinstance(answer, HybridSDError):
        raise answer
    click.echo(_shown(answer))


def _ask(gateway: str, timeout_s: float) -> str:
    """Returns what /readyz says.

    Raises:
        InvalidRequest: FIELD_INVALID if the address is none.
        CloudUnreachable: If it does not answer, or says that it is not ready.
    """
    try:
        url = urlsplit(gateway)
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[url.scheme]
        connection = kind(url.hostname or "", url.port, timeout=timeout_s)
        if not url.hostname:
            raise ValueError("no host")
    except (KeyError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(
            f"`gateway` is {gateway[:80]!r}; give its address, such as {DEFAULT_GATEWAY}", field="gateway"
        ) from error
    try:
        connection.request("GET", f"{url.path.rstrip('/')}/readyz")
        with connection.getresponse() as response:
            text: str = response.read(_MAX_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _away(gateway, str(error) or type(error).__name__) from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise _away(gateway, f"it answers {response.status} {response.reason} {text[:200]}".rstrip())
    return text


def _away(gateway: str, why: str) -> HybridSDError:
    return Reason.UNAVAILABLE.error(f"{gateway} is not ready: {_shown(why)}; look at its log")


def _shown(text: str) -> str:
    """Returns what a peer says without what would steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
