"""`hybridsd bundle`: inspects bundles, verifies and fetches them."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edge_client.bundles import bundle as bundles
from edge_client.bundles import download
from edge_client.cli.open_parts import open_cloud
from edge_client.cli.shared_options import CONTEXT, bundle_option, server_options
from edge_client.paths import bundles_folder
from hybridsd.errors import Reason


@click.group(context_settings=CONTEXT)
def bundle() -> None:
    """Looks at, checks and gets the models of this device."""


@bundle.command(context_settings=CONTEXT)
@bundle_option
@click.option("--json", "as_json", envvar="HYBRIDSD_EDGE_JSON", is_flag=True, help="Print the manifest as JSON.")
def inspect(bundle_name: str | None, as_json: bool) -> None:
    """Shows what a bundle holds."""
    opened = bundles.open_bundle(bundles.locate(bundle_name))
    manifest = opened.manifest
    if as_json:
        click.echo(json.dumps({"folder": str(opened.folder), **asdict(manifest)}, indent=2))
        return
    defaults = manifest.defaults
    click.echo(f"{manifest.name}  {opened.folder}")
    click.echo(f"  latent space  {manifest.latent_space}, {manifest.latent_channels} channels")
    click.echo(f"  text          {manifest.context_length} tokens of {manifest.embed_dim}")
    click.echo(
        f"  defaults      {defaults.scheduler}, {defaults.num_inference_steps} steps, {defaults.cloud_steps} of them "
        f"in the cloud, guidance {defaults.guidance_scale:g}, {defaults.width}x{defaults.height}"
    )
    click.echo(f"  plans         {opened.describe_plans()}")
    if manifest.max_timestep is not None:
        click.echo(f"  noise levels  {opened.describe_levels()}")
    for role, file in manifest.files.items():
        count = manifest.num_parameters.get(role)
        size = f"{file.size_bytes / 2**20:.2f} MiB"
        click.echo(f"  {role:<13} {file.path}, {size}" + ("" if count is None else f", {count:,} parameters"))
    for point in manifest.quality:
        click.echo(
            f"  quality       {point.metric} {point.value:g} with {point.cloud_steps} of "
            f"{point.num_inference_steps} steps in the cloud"
            + ("" if point.samples is None else f", of {point.samples} images")
        )
    if manifest.licence:
        click.echo(f"  licence       {manifest.licence}")


@bundle.command(context_settings=CONTEXT)
@bundle_option
def verify(bundle_name: str | None) -> None:
    """Checks every file of a bundle against its hash."""
    opened = bundles.open_bundle(bundles.locate(bundle_name))
    problems = opened.verify()
    for problem in problems:
        click.echo(problem)
    if problems:
        raise Reason.MANIFEST_INVALID.error(f"{opened.folder} is broken; fetch or export it again", field="bundle")
    click.echo(f"{opened.folder}: {len(opened.manifest.files)} files, all as the manifest says")


@bundle.command(context_settings=CONTEXT)
@click.argument("name", required=False)
@click.option("--into", type=click.Path(path_type=Path), help="The folder to make. Default: the user's data folder.")
@server_options
def fetch(name: str | None, into: Path | None, server: str, **access: Any) -> None:
    """Gets a bundle from the cloud; without NAME lists those there are. A broken download is resumed."""
    with open_cloud(server, **access) as cloud:
        found = cloud.capabilities()
        offered = found.bundles
        if name is None:
            if not offered:
                click.echo(f"{server} offers no bundles; its operator names them with --bundle", err=True)
            for key, files in offered.items():
                most = found.max_timesteps.get(key)
                levels = "" if most is None else f", draws timesteps up to {most:g}; the cloud those above"
                click.echo(f"{key}  {sum(file.size_bytes for file in files) / 2**20:.1f} MiB{levels}")
            return
        if name not in offered:
            listed = ", ".join(offered) or "none"
            raise Reason.NOT_FOUND.error(f"{server} has no bundle {name!r}; it has: {listed}", field="name")
        target = bundles_folder() / name if into is None else into
        if os.path.lexists(target):
            raise Reason.FIELD_INVALID.error(f"{target} is there already; remove it, or give --into", field="into")
        for progress in download.fetch(cloud, name, offered[name], target):
            if progress.done_bytes == progress.size_bytes:
                click.echo(f"{progress.path}: {progress.size_bytes} bytes", err=True)
    click.echo(str(target))
