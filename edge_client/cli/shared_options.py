"""Options that several commands share, and the bundle, models and cloud that they name."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from edge_client import cache
from edge_client.bundles import bundle as bundles
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.paths import cache_folder
from edge_client.request import Patience
from hybridsd.errors import Reason
from hybridsd.manifest import Manifest

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT: dict[str, Any] = {"auto_envvar_prefix": "HYBRIDSD_EDGE", "help_option_names": ["-h", "--help"]}
DEFAULT_SERVER = "127.0.0.1:50051"


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
            "--token-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="File with the access token. HYBRIDSD_EDGE_TOKEN holds the token itself.",
        ),
        click.option("--server", default=DEFAULT_SERVER, show_default=True, help="The cloud, as host:port."),
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


def open_bundle(name: str | None) -> bundles.Bundle:
    """Returns the bundle to use, its files checked."""
    bundle = bundles.open_bundle(bundles.locate(name))
    bundle.verify_once(cache_folder())
    return bundle


def open_edge_models(given: Sequence[str], manifest: Manifest, **options: Any) -> dict[str, Models]:
    """Returns more edge models by name, from `NAME=DIR` texts.

    Args:
        given: The texts; DIR is a folder or the name of a fetched bundle.
        manifest: Of the bundle that they go with.
        **options: Of `Models`.

    Raises:
        InvalidRequest: FIELD_INVALID for a text that is none; MANIFEST_INVALID for a folder that is no bundle.
        ModelMismatch: LATENT_SPACE_MISMATCH.
    """
    models = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not (name and equals and where):
            raise Reason.FIELD_INVALID.error(f"edge-model is {text[:80]!r}; give NAME=DIR", field="edge_models")
        bundle = open_bundle(where)
        if bundle.manifest.latent_space != manifest.latent_space:
            raise Reason.LATENT_SPACE_MISMATCH.error(
                f"edge model {name} has latent space {bundle.manifest.latent_space!r}, {manifest.name} has "
                f"{manifest.latent_space!r}; choose models of one",
                field="edge_models",
            )
        models[name] = Models(bundle.folder, bundle.manifest, **options)
    return models


def open_cloud(
    server: str,
    *,
    token_file: Path | None,
    tls_ca: Path | None,
    insecure: bool,
    patience: Patience | None = None,
) -> Cloud:
    """Returns a connection to the cloud; nothing is sent yet."""
    token = os.environ.get("HYBRIDSD_EDGE_TOKEN", "").strip() or None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise Reason.FIELD_INVALID.error(f"cannot read {token_file}: {error}", field="token_file") from error
    return Cloud(
        server, token=token, tls_ca=tls_ca, insecure=insecure, cache=cache.Cache(cache_folder()), patience=patience
    )
