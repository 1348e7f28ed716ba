"""The gateway's certificate: made here where none is given, and read again when its files change."""

import ssl
from pathlib import Path

import structlog

from hybridsd import certificates

log = structlog.get_logger()


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Returns a context that follows two files: each new connection has what they hold then.

    Files that cannot be used are logged, once for each change, and what was read before stays good.

    Args:
        cert: Chain in PEM.
        key: In PEM; may be the same file.

    Raises:
        ValueError: If they cannot be used at first.
    """
    where = str(cert)

    def on_reload(wrong: str | None) -> None:
        if wrong is None:
            shown = certificates.show(certificates.fingerprint(cert.read_bytes()))
            log.info("certificate_reloaded", file=where, fingerprint=shown)
        else:
            log.error("certificate_not_reloaded", file=where, message=f"{wrong}; the one of before stays in use")

    return certificates.server_context(cert, key, on_reload=on_reload)
