"""Opens the bundle, models and cloud that options name."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_client import cache
from edge_client.bundles import bundle as bundles
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.cloud.token_file import TokenFile
from edge_client.inference.models import Models
from edge_client.paths import cache_folder
from edge_client.request import Patience
from hybridsd.errors import Reason
from hybridsd.manifest import Manifest


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
            raise Reason.FIELD_INVALID.error(f"`edge_models` is {text[:80]!r}; give NAME=DIR", field="edge_models")
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
    tls_fingerprints: Sequence[str] = (),
    client_cert: Path | None = None,
    client_key: Path | None = None,
    insecure: bool,
    patience: Patience | None = None,
) -> Pool:
    """Returns connections to the clouds; nothing is sent yet.

    Args:
        server: "host:port" of each, with commas between them.
        token_file: Holds the token that they are shown; read again when it changes.
        tls_ca: As of `Cloud`, like the others; they hold for each.
        tls_fingerprints: As above.
        client_cert: As above.
        client_key: As above.
        insecure: As above.
        patience: As above.
    """
    token = TokenFile(token_file) if token_file is not None else os.environ.get("HYBRIDSD_EDGE_TOKEN", "").strip()
    shared = cache.Cache(cache_folder())

    def connect(target: str, address: str | None) -> Cloud:
        return Cloud(
            target, address=address, token=token, tls_ca=tls_ca, tls_fingerprints=tls_fingerprints,
            client_cert=client_cert, client_key=client_key, insecure=insecure, cache=shared, patience=patience,
        )  # fmt: skip

    return Pool(server.split(","), connect)


POLL_INTERVAL_S = 0.2
MAX_DIGITS = 5
"""Of a port."""


def wait_for_server(server: str, patience_s: float, note: Callable[[str], None]) -> None:
    """Waits until a server that is starting listens, which it does when its models are loaded; of several, any.

    Args:
        server: host:port, of several with commas between them. What is none is left to whoever connects.
        patience_s: How long, in seconds. Nothing is raised in the end: the cloud is then away, as any other.
        note: Says once that it waits.
    """
    give_up_at = time.monotonic() + patience_s
    has_said = False
    places = [(host.strip("[]"), port) for host, _, port in (each.rpartition(":") for each in server.split(","))]
    are_numbers = all(port.isdecimal() and len(port) <= MAX_DIGITS for _, port in places)
    while are_numbers and not any(_listens(host, int(port)) for host, port in places) and time.monotonic() < give_up_at:
        if not has_said:
            note(f"cloud: waiting for {server}, {patience_s:g} s at most")
            has_said = True
        time.sleep(POLL_INTERVAL_S)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except (OSError, ValueError, OverflowError):  # a name that is none, a port that is none
        return False
    return True
