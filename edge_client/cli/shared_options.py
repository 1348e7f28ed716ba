"""Options that several commands share. Imports nothing that is slow to import."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from hybridsd import tracing

F = TypeVar("F", bound=Callable[..., Any])


class NumberRange(click.FloatRange):
    """A number in a range; NaN, which no comparison finds outside, is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


CONTEXT: dict[str, Any] = {"auto_envvar_prefix": "HYBRIDSD_EDGE", "help_option_names": ["-h", "--help"]}
DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_PORT = 8080
DEFAULT_GATEWAY = f"http://127.0.0.1:{DEFAULT_PORT}"


class _Servers(click.ParamType[str]):
    """One or more targets with commas between them; in the variable also with white space."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns it without white space."""
        return ",".join(filter(None, (part.strip() for part in str(value).replace(",", " ").split())))


def read_traces(options: Mapping[str, Any], service: str) -> None:
    """Switches tracing on, where `--traces` asks for it."""
    if options["traces"] != "none":
        tracing.switch_on(service, options["traces"])


traces_option = click.option(
    "--traces", type=click.Choice(tracing.EXPORTERS), default="none", show_default=True,
    help="Where spans go; otlp: to an OpenTelemetry collector, as the OTEL_* variables say. They hold no prompts.",
)  # fmt: skip

SERVER_ACCESS = ("token_file", "tls_ca", "tls_fingerprints", "client_cert", "client_key", "insecure")
"""Of `server_options` those that say how to talk to it."""


def server_options(command: F) -> F:
    """Adds the options that say where the cloud is and how to talk to it."""
    for option in (
        click.option("--insecure", is_flag=True, help="Allow plain text to a server that is not this machine."),
        click.option(
            "--tls-ca",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="PEM file of the authority that signed the server's certificate. Without it, servers elsewhere are "
            "checked against the system's authorities, and this machine is spoken to in plain text.",
        ),
        click.option(
            "--tls-fingerprint",
            "tls_fingerprints",
            envvar="HYBRIDSD_EDGE_TLS_FINGERPRINT",
            multiple=True,
            metavar="SHA256",
            help="Take the server's certificate with this fingerprint, and no other; `hybridsd-cloud fingerprint` "
            "prints it there. Repeatable: for several servers, or before a certificate is renewed.",
        ),
        click.option(
            "--client-cert",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Certificate chain to show to the server, PEM, if it asks who calls.",
        ),
        click.option(
            "--client-key",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Its private key, PEM.",
        ),
        click.option(
            "--token-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="File with the access token, read again when it changes. HYBRIDSD_EDGE_TOKEN holds the token itself.",
        ),
        click.option(
            "--server",
            multiple=True,
            default=(DEFAULT_SERVER,),
            show_default=True,
            metavar="HOST:PORT",
            type=_Servers(),
            callback=lambda _context, _option, given: ",".join(given),
            help="A cloud. Repeatable, or several with commas, and a name may have several addresses: the least loaded "
            "is asked, and one stands in for another.",
        ),
    ):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """Adds the options that say which models run here and how."""
    for option in (
        click.option("--low-memory", is_flag=True, help="Keep one model in memory at a time: slower, smaller."),
        click.option("--threads", type=click.IntRange(1, 1024), help="Threads for one model. Default: all cores."),
        click.option(
            "--provider",
            help="What runs the models: cpu, cuda, openvino:gpu and so on. Default: the best.",
        ),
        bundle_option,
    ):
        command = option(command)
    return command


bundle_option = click.option(
    "--bundle",
    "bundle_name",
    metavar="DIR",
    envvar="HYBRIDSD_EDGE_BUNDLE",
    help="Folder of the edge bundle, or the name of a fetched one. Default: the repository's demo, then a fetched one.",
)
