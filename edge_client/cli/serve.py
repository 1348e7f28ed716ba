"""`hybridsd serve`: the gateway of `edge_client.web` as a process."""

import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import platformdirs
import structlog

from edge_client.addresses import is_loopback
from edge_client.cli import output_files
from edge_client.cli.energy_options import energy_options, read_account
from edge_client.cli.open_parts import open_bundle, open_cloud, open_edge_models
from edge_client.cli.patience_options import patience_options, read_patience
from edge_client.cli.shared_options import (
    CONTEXT,
    DEFAULT_PORT,
    SERVER_ACCESS,
    model_options,
    read_traces,
    server_options,
    traces_option,
)
from edge_client.inference.models import Models
from edge_client.web import logs
from edge_client.web.app import create_app
from edge_client.web.connections import PatientServer, server_config
from edge_client.web.settings import LEASE_S, Settings
from edge_client.web.tls import server_context
from hybridsd import certificates, tracing
from hybridsd.errors import Reason
from hybridsd.tokens import Tokens, warn_of_readers

log = structlog.get_logger()

_DEMO = ("deploy", "demo", "edge")
"""Where the repository has the demo's bundle."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings=CONTEXT)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any free one.")
@click.option("--port-file", type=click.Path(dir_okay=False, path_type=Path), help="File to write the port to.")
@click.option(
    "--tls-cert", type=_FILE,
    help="Certificate chain of the gateway, PEM. Without one, a gateway beyond this machine makes its own, for "
    "--allowed-host too, keeps it in --data-dir, and prints the fingerprint.",
)  # fmt: skip
@click.option("--tls-key", type=_FILE, help="Its private key, PEM.")
@click.option(
    "--http", "plain_http", envvar="HYBRIDSD_EDGE_HTTP", is_flag=True,
    help="Serve plain HTTP beyond this machine, as behind a proxy that speaks HTTPS.",
)  # fmt: skip
@click.option(
    "--client-tokens", type=_FILE,
    help="File with the tokens that web clients must send: named and hashed, as `hybridsd tokens` makes it, or as "
    "plain text, one a line. Each sees its own jobs. The file is read again when it changes. Needed beyond this "
    "machine, unless --open.",
)  # fmt: skip
@click.option(
    "--open", "is_open", envvar="HYBRIDSD_EDGE_OPEN", is_flag=True, help="Let everybody in who can reach the address."
)
@click.option(
    "--allowed-host", "allowed_hosts", envvar="HYBRIDSD_EDGE_ALLOWED_HOST", multiple=True, metavar="NAME",
    help="Name by which clients call the gateway. Repeatable. Default: this machine's name and addresses, or any with "
    "tokens.",
)  # fmt: skip
@click.option(
    "--trusted-proxy", "trusted_proxies", envvar="HYBRIDSD_EDGE_TRUSTED_PROXY", multiple=True, metavar="ADDRESS",
    help="Address or network of a proxy before the gateway, which is believed for whom it asks (X-Forwarded-For). "
    "Repeatable.",
)  # fmt: skip
@click.option(
    "--cors-origin", "cors_origins", envvar="HYBRIDSD_EDGE_CORS_ORIGIN", multiple=True, metavar="ORIGIN",
    help="Site whose pages may use it. Repeatable.",
)  # fmt: skip
@click.option(
    "--webhook-host", "webhook_hosts", envvar="HYBRIDSD_EDGE_WEBHOOK_HOST", multiple=True, metavar="HOST",
    help="Host that jobs may notify. Repeatable.",
)  # fmt: skip
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path),
    help="Folder of jobs and images. Default: in the data folder of this user.",
)  # fmt: skip
@click.option(
    "--database", envvar=["HYBRIDSD_DATABASE", "HYBRIDSD_EDGE_DATABASE"], metavar="URL",
    help="Postgres for the jobs, which several replicas of the gateway share, such as postgresql://user@host/hybridsd. "
    "A password belongs into the variable: others see options. Default: SQLite in --data-dir, of this gateway alone.",
)  # fmt: skip
@click.option(
    "--images", metavar="FOLDER|URL",
    help="Where images are, for all replicas alike: a shared folder, or an address of fsspec such as "
    "s3://bucket/images. Default: --data-dir.",
)  # fmt: skip
@click.option(
    "--lease", type=click.FloatRange(1, 600), default=LEASE_S, show_default=True, metavar="SECONDS",
    help="With --database: how long a replica may be silent before another runs its jobs.",
)  # fmt: skip
@click.option("--max-jobs", type=click.IntRange(1), default=1000, show_default=True, help="Finished jobs to keep.")
@click.option(
    "--max-data-mib", type=click.IntRange(64), default=10240, show_default=True,
    help="Size of their images. Beyond both, the oldest job of the token with most is deleted.",
)  # fmt: skip
@click.option("--max-queue", type=click.IntRange(1), default=256, show_default=True, help="Jobs that may wait.")
@click.option("--max-body-mib", type=click.IntRange(1, 1024), default=32, show_default=True, help="Of one request.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Jobs that run at once.")
@click.option(
    "--edge-model", "edge_models", envvar="HYBRIDSD_EDGE_EDGE_MODEL", multiple=True, metavar="NAME=DIR",
    help="Another edge bundle, for segments that name it. Repeatable.",
)  # fmt: skip
@click.option(
    "--fit-size/--no-fit-size", default=None,
    help="Take any width and height: draw the nearest size that the models have, and resize. A request may differ. "
    "Default: only with the demo's bundle.",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(["auto", "console", "json"]), default="auto", show_default=True,
    help="Of the log: lines for people, or one JSON object a line; auto is the first on a terminal.",
)  # fmt: skip
@click.option("--no-cloud", is_flag=True, help="Draw everything here.")
@traces_option
@energy_options
@server_options
@patience_options
@model_options
def serve(**options: Any) -> None:
    """Serves web clients: OpenAI's images API, AUTOMATIC1111's, jobs with events, and a page to draw with."""
    settings = _settings(options)
    logs_json = logs.configure(options["log_format"])
    read_traces(options, "hybridsd-gateway")
    bundle = open_bundle(options["bundle_name"])
    runs_with = {name: options[name] for name in ("provider", "threads", "low_memory")}
    models = Models(bundle.folder, bundle.manifest, **runs_with)
    others = open_edge_models(options["edge_models"], bundle.manifest, **runs_with)
    cloud = None
    if not options["no_cloud"]:
        access = {name: options[name] for name in SERVER_ACCESS}
        cloud = open_cloud(options["server"], patience=read_patience(options), **access)
    if options["fit_size"] is None:
        settings = replace(settings, fit_size=bundle.folder.parts[-3:] == _DEMO)
    app = create_app(settings, bundle, models, cloud, others=others, account=read_account(options, models))
    tls, cert = _certificate(options, settings.data_dir)
    listener = _listen(options["host"], options["port"])
    port = listener.getsockname()[1]
    scheme = "http" if tls is None else "https"
    _say_where(f"{scheme}://{_shown(options['host'])}:{port}/", cert, as_json=logs_json)
    if cert is not None:
        app.state.metrics.watch_certificate(lambda: certificates.valid_until(cert.read_bytes()))
    if options["port_file"] is not None:
        output_files.write(options["port_file"], f"{port}\n".encode(), overwrite=True)
    config = server_config(
        app, tls=tls, trusted_proxies=options["trusted_proxies"], log_config=None, timeout_graceful_shutdown=5
    )
    try:
        PatientServer(config).run(sockets=[listener])
    finally:
        if cloud is not None:
            cloud.close()
        tracing.switch_off()


def _say_where(address: str, cert: Path | None, *, as_json: bool) -> None:
    """Says where it listens, and with which certificate, in the log's format: a log of JSON has nothing else."""
    fingerprint = None if cert is None else certificates.show(certificates.fingerprint(cert.read_bytes()))
    if as_json:
        log.info("listening", address=address, fingerprint=fingerprint)
        return
    click.echo(f"serving on {address}", err=True)
    if fingerprint is not None:
        click.echo(f"its certificate has the SHA-256 fingerprint {fingerprint}", err=True)


def _certificate(options: dict[str, Any], data_dir: Path) -> tuple[ssl.SSLContext | None, Path | None]:
    """Returns what the gateway speaks TLS with, and the file of its certificate; None to speak plain HTTP.

    Raises:
        InvalidRequest: FIELD_INVALID if the certificate cannot be used, or none be kept.
    """
    cert, key = options["tls_cert"], options["tls_key"]
    if cert is None and (options["plain_http"] or is_loopback(options["host"])):
        return None, None
    try:
        if cert is None:
            names = certificates.names_of_this_machine((options["host"], *options["allowed_hosts"]))
            made = certificates.own_certificate(data_dir / "tls", names)
            if made.replaces:
                log.warning("certificate_renewed", file=str(made.path), message="the old one was near its end")
            cert = key = made.path
        return server_context(cert, key), cert
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(
            f"there is no certificate for HTTPS: {error}; give --tls-cert and --tls-key, or --http to serve in plain "
            "text", field="tls_cert",
        ) from error  # fmt: skip


def _settings(options: dict[str, Any]) -> Settings:
    for proxy in options["trusted_proxies"]:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise Reason.FIELD_INVALID.error(
                f"--trusted-proxy {proxy!r} is no address; give one such as 10.0.0.2, or a network such as 10.0.0.0/8",
                field="trusted_proxies",
            ) from None
    host, tokens = options["host"], _read_tokens(options["client_tokens"])
    if (options["tls_cert"] is None) != (options["tls_key"] is None):
        raise Reason.FIELD_INVALID.error("--tls-cert and --tls-key go together; give both", field="tls_cert")
    if tokens is None and not is_loopback(host) and not options["is_open"]:
        raise Reason.FIELD_INVALID.error(
            f"{host} can be reached from elsewhere, and nobody would need a token; give --client-tokens, or --open",
            field="host",
        )
    names, any_address = _host_names(host, options["allowed_hosts"], has_tokens=tokens is not None)
    return Settings(
        data_dir=options["data_dir"] or platformdirs.user_data_path("hybridsd") / "gateway",
        database=options["database"] or None,
        images=options["images"] or None,
        lease_s=options["lease"],
        tokens=tokens,
        hosts=names,
        any_address=any_address,
        cors_origins=options["cors_origins"],
        webhook_hosts=options["webhook_hosts"],
        workers=options["workers"],
        max_queue=options["max_queue"],
        max_jobs=options["max_jobs"],
        max_data_bytes=options["max_data_mib"] << 20,
        fit_size=bool(options["fit_size"]),
        max_body_bytes=options["max_body_mib"] << 20,
        cloud_dollars_per_hour=options["cloud_price"],
    )


def _read_tokens(path: Path | None) -> Tokens | None:
    """Returns the tokens of a file, which is read again when it changes.

    Raises:
        InvalidRequest: FIELD_INVALID if it cannot be read, with what is wrong.
    """
    if path is None:
        return None
    try:
        if warning := warn_of_readers(path):
            click.echo(f"Warning: {warning}", err=True)
        return Tokens(path, on_reload=_log_reload)
    except ValueError as error:
        raise Reason.FIELD_INVALID.error(f"{error}; change `client_tokens`", field="client_tokens") from None


def _log_reload(wrong: str | None) -> None:
    if wrong is None:
        log.info("client_tokens_reloaded")
    else:
        log.error("client_tokens_not_reloaded", wrong=wrong, what="the tokens of before stay good")


def _host_names(host: str, allowed: Sequence[str], *, has_tokens: bool) -> tuple[Sequence[str], bool]:
    """Returns the names that clients may call the gateway by, and whether they may use any address.

    Without tokens, a site whose name points here could else have its visitors' browsers use the gateway. It needs a
    name for that: an address is nobody else's.
    """
    if allowed:
        return allowed, False
    if has_tokens:
        return ("*",), True
    if is_loopback(host):
        return _LOOPBACK_NAMES, False
    name = socket.gethostname().casefold()
    return (*_LOOPBACK_NAMES, host.casefold(), name, f"{name}.local"), True


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        InvalidRequest: FIELD_INVALID if the address is taken or not here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen()  # from now on the kernel keeps who comes before uvicorn is up
    except OSError as error:
        listener.close()
        what = f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; choose another --port"
        raise Reason.FIELD_INVALID.error(what, field="port") from error
    listener.set_inheritable(True)
    return listener


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
