"""The server's certificate, and those of its callers: read again when their files change."""

import ssl
from datetime import datetime
from pathlib import Path

import grpc
import structlog

from cloud_server import preflight
from cloud_server.settings import Settings
from hybridsd import certificates

log = structlog.get_logger()

_asked_by_core: list[grpc.ServerCredentials] = []
"""All that were made: gRPC's core keeps a bare pointer, which a handshake may follow after the server is gone."""


def credentials(settings: Settings) -> grpc.ServerCredentials:
    """Returns credentials that follow the files of the settings: each new connection has what they hold then.

    Streams go on over their old connections. Files that cannot be used are logged, once for each change, and what
    was read before stays good. gRPC asks from its own threads.

    Raises:
        ValueError: If the files cannot be used at first, or no certificate can be made.
    """
    settings = preflight.provide_certificate(settings)
    if settings.tls_cert is None or settings.tls_key is None:
        raise ValueError("there is no certificate; give --tls-cert and --tls-key")
    where = str(settings.tls_cert)

    def on_reload(wrong: str | None) -> None:
        if wrong is None:
            log.info("certificate_reloaded", file=where, fingerprint=shown())
        else:
            log.error("certificate_not_reloaded", file=where, message=f"{wrong}; the one of before stays in use")

    files = certificates.CertificateFiles(
        settings.tls_cert, settings.tls_key, settings.tls_client_ca, on_reload=on_reload
    )

    def shown() -> str:
        return certificates.show(certificates.fingerprint(files.current.cert))

    def reload() -> grpc.ServerCertificateConfiguration | None:
        changed = files.reload()
        return None if changed is None else _configuration(changed)

    log.info(
        "certificate", file=where, fingerprint=shown(), clients_need_one=settings.tls_client_ca is not None,
        message="clients pin it with --tls-fingerprint",
    )  # fmt: skip
    made = grpc.dynamic_ssl_server_credentials(
        _configuration(files.current),
        reload,  # type: ignore[arg-type]  # None is: as before
        require_client_authentication=settings.tls_client_ca is not None,
    )
    _asked_by_core.append(made)
    return made


def http_context(settings: Settings) -> ssl.SSLContext:
    """Returns the same certificate for HTTP, which follows its files as well.

    Raises:
        ValueError: If the files cannot be used at first.
    """
    return certificates.server_context(*_pair(settings))


def valid_until(settings: Settings) -> datetime:
    """Returns when the certificate ends that the files have now."""
    return certificates.valid_until(_pair(settings)[0].read_bytes())


def _pair(settings: Settings) -> tuple[Path, Path]:
    settings = preflight.provide_certificate(settings)
    if settings.tls_cert is None or settings.tls_key is None:
        raise ValueError("there is no certificate; give --tls-cert and --tls-key")
    return settings.tls_cert, settings.tls_key


def _configuration(contents: certificates.Contents) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(contents.key, contents.cert)], root_certificates=contents.client_ca
    )
