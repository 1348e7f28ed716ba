"""`hybridsd doctor`: checks everything that an image needs, and says what to do where something is wrong."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_client.bundles import bundle as bundles
from edge_client.bundles.bundle import Bundle
from edge_client.cli import system_info
from edge_client.cli.energy_options import read_account
from edge_client.cli.open_parts import open_cloud
from edge_client.cli.shared_options import CONTEXT, model_options, server_options
from edge_client.cli.words import in_options
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.inference.models import Models
from edge_client.inference.providers import available_providers, openvino_installed
from edge_client.paths import cache_folder
from hybridsd import noise
from hybridsd.errors import HybridSDError
from hybridsd.manifest import Manifest
from hybridsd.plan import unet_input


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str
    """What was found; where it is wrong, also what to do."""
    failure_code: int = 70
    """Exit code of the command if this is what is wrong."""

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong."""
        return 0 if self.ok else self.failure_code

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "exit_code": self.exit_code}


@click.command(context_settings=CONTEXT)
@server_options
@model_options
@click.option("--offline", is_flag=True, help="Leave the cloud out.")
@click.option("--json", "as_json", envvar="HYBRIDSD_EDGE_JSON", is_flag=True, help="Print one JSON object.")
def doctor(
    server: str,
    bundle_name: str | None,
    provider: str | None,
    threads: int | None,
    low_memory: bool,
    offline: bool,
    as_json: bool,
    **access: Any,
) -> None:
    """Checks bundle, models and cloud, one line each, and says what to do where something is wrong."""
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        if not as_json:
            click.echo(f"{'ok   ' if check.ok else 'WRONG'}  {check.name:<9} {check.detail}")

    note(check_cache(cache_folder()))
    bundle: Bundle | None = None
    try:
        bundle = bundles.open_bundle(bundles.locate(bundle_name))
        for check in check_device(bundle, provider=provider, threads=threads, low_memory=low_memory):
            note(check)
    except HybridSDError as error:
        note(_failed("bundle" if bundle is None else "models", error))
    if not offline:
        try:
            with open_cloud(server, **access) as pool:
                for check in check_clouds(pool, bundle):
                    note(check)
        except HybridSDError as error:
            note(_failed("cloud", error))
    exit_code = next((check.exit_code for check in checks if not check.ok), 0)
    if as_json:
        rows = [check.as_json() for check in checks]
        click.echo(json.dumps({"ok": exit_code == 0, "exit_code": exit_code, "checks": rows}))
    click.get_current_context().exit(exit_code)


def check_device(bundle: Bundle, **options: Any) -> Iterator[Check]:
    """Checks the files and runs each model once.

    Args:
        bundle: The bundle.
        **options: What `Models` takes.
    """
    manifest = bundle.manifest
    problems = bundle.verify()
    if problems:
        yield Check("bundle", False, f"{bundle.folder}: {'; '.join(problems)}; fetch or export it again", 2)
        return
    yield Check("bundle", True, f"{manifest.name} in {bundle.folder}, {len(manifest.files)} files as they should be")
    models = Models(bundle.folder, manifest, **options)
    models.warm_up()  # only now is it known which provider runs them
    asked = options.get("provider")
    started = asked is None or models.choice.by_name
    others = ", ".join(sorted(set(available_providers()) - {models.choice.name}))
    also = f"; also here: {others}" if others else ""
    yield Check("provider", started, f"{models.choice.describe()}{also}")
    report = models.self_test(fresh=True)
    if report is not None:
        yield Check("self-test", report.ok, report.describe())
    yield from _hints(models)
    names = bundle.plan_names()
    default = f"{manifest.defaults.scheduler}/{manifest.defaults.num_inference_steps}"
    if default in names:
        yield Check("plans", True, bundle.describe_plans())
    else:
        yield Check("plans", False, f"the default {default} is missing; export the bundle again", 3)
    if manifest.max_timestep is not None:
        yield Check("levels", True, bundle.describe_levels())
    conditioning, _ = models.encode_pair("a test", "" if models.takes_negative else None)
    cell = manifest.vae_scale_factor
    shape = (manifest.latent_channels, manifest.defaults.height // cell, manifest.defaults.width // cell)
    latents = noise.initial_latents(0, 0, shape)
    plan = bundle.find_plan(manifest.defaults.scheduler, manifest.defaults.num_inference_steps)
    timestep = 500.0 if plan is None else plan.rows[0].timestep
    fed = latents if plan is None else unet_input(plan.rows[0], [np.float32(plan.init_noise_sigma) * latents])
    if manifest.unet_role(timestep) != "unet":
        high = models.predict_noise(fed, timestep, conditioning, guidance_scale=2.0)
        timestep = 0.0
    else:
        high = fed
    begin = time.perf_counter()
    predicted = models.predict_noise(fed, timestep, conditioning, guidance_scale=2.0)
    step_s = time.perf_counter() - begin
    image = models.decode(latents)
    decode_s = time.perf_counter() - begin - step_s
    expected = (3, manifest.defaults.height, manifest.defaults.width)
    wrong = [
        what
        for what, array, right in (
            ("text encoder", conditioning.prompt_embeds, (manifest.context_length, manifest.embed_dim)),
            ("U-Net", predicted, shape),
            ("U-Net for high noise levels", high, shape),
            ("decoder", image, expected),
        )
        if array.shape != right or not np.isfinite(array).all()
    ]
    if wrong:
        what = ", ".join(wrong)
        yield Check("models", False, f"{what}: wrong shape or values; choose another --provider or export again")
    else:
        times = f"one step ({1e3 * step_s:.0f} ms) and a decode ({1e3 * decode_s:.0f} ms)"
        yield Check("models", True, f"text, {times} at {expected[2]}x{expected[1]}: all finite")


def _hints(models: Models) -> Iterator[Check]:
    """Says what would make this device faster, and whether the models fit into its memory."""
    needed = sum(
        file.size_bytes for role, file in models.manifest.files.items() if file.path.endswith((".onnx", ".data"))
    )
    found = system_info.read_device()
    enough = found.free_bytes > 2 * needed
    advice = "" if enough else "; use --low-memory, or a bundle of another precision"
    limited = ", as a container or an affinity allows" if found.is_limited else ""
    yield Check(
        "memory", enough or models.low_memory,
        f"{found.free_bytes / 2**20:.0f} MiB are free, the models are {needed / 2**20:.0f} MiB{advice};"
        f" {found.num_cores} cores{limited}",
    )  # fmt: skip
    yield check_energy(models.manifest, read_account({}, models).why_modelled)
    if models.choice.is_reference and system_info.cpu_flags() & {"amx_bf16", "avx512_bf16"}:
        how = "--provider openvino computes in bf16, which this CPU has in hardware"
        what = how if openvino_installed() else f"{how}; pip install openvino"
        yield Check("speed", True, f"{what} (slightly different images)")


def check_energy(manifest: Manifest, why_modelled: str) -> Check:
    """Says how the energy of images is known here; nothing of it is wrong."""
    if not why_modelled:
        return Check("energy", True, "measured by a counter of this device")
    how = "modelled from the bundle's MACs" if manifest.macs else "unknown, for the bundle says no MACs; give --watts"
    return Check("energy", True, f"{how}; not measured: {why_modelled}")


def check_cache(folder: Path) -> Check:
    """Checks whether embeddings and self-tests can be kept; without that images cost more bytes and time."""
    try:
        free = system_info.free_disk_bytes(folder)
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror}); set HYBRIDSD_EDGE_CACHE to a folder that can"
        return Check("cache", False, what)
    return Check("cache", True, f"{folder}, {free / 2**20:.0f} MiB free on its disk")


def check_clouds(pool: Pool, bundle: Bundle | None) -> Iterator[Check]:
    """Checks each cloud; all are asked at once, and one that is away does not hide the others."""
    members = pool.members()
    with ThreadPoolExecutor(len(members)) as threads:
        for checks in threads.map(lambda member: _check_one(member.cloud, bundle), members):
            yield from checks


def _check_one(cloud: Cloud, bundle: Bundle | None) -> list[Check]:
    try:
        return list(check_cloud(cloud, bundle))
    except HybridSDError as error:
        return [_failed("cloud", error)]


def check_cloud(cloud: Cloud, bundle: Bundle | None) -> Iterator[Check]:
    """Asks the cloud what it can do, and compares that with the bundle."""
    found = cloud.capabilities()  # a missing or wrong token fails here
    busy = f"{found.num_running} running, {found.num_queued} waiting"
    yield Check("cloud", True, f"{cloud.target} ({cloud.trust.describe()}) runs version {found.server_version}; {busy}")
    ids = ", ".join(model.id for model in found.models)
    if bundle is None:
        yield Check("pairing", False, f"no bundle to pair with {ids}", 2)
        return
    manifest = bundle.manifest
    space, texts = manifest.latent_space, ((manifest.context_length, manifest.embed_dim), manifest.pooled_dim)
    same_space = [model for model in found.models if model.latent_space == space]
    fitting = [model.id for model in same_space if model.reads_as(*texts)]
    apart = [f"{model.id} reads texts as {model.describe_texts()}" for model in same_space if model.id not in fitting]
    also = f"; not {', '.join(apart)}" if apart else ""
    if fitting:
        cold = {model.id: f" ({model.state})" for model in same_space if model.state != "warm"}
        names = ", ".join(f"{model}{cold.get(model, '')}" for model in fitting)
        yield Check("pairing", True, f"latent space {space!r} is that of {names}{also}")
    else:
        others = ", ".join(apart or (f"{model.id}: {model.latent_space!r}" for model in found.models)) or "no models"
        what = f"{manifest.name} (latent space {space!r}, texts as {texts[0][0]} tokens of {texts[0][1]} features)"
        yield Check("pairing", False, f"{what} fits none there ({others}); choose another --bundle", 3)


def _failed(name: str, error: HybridSDError) -> Check:
    return Check(name, False, in_options(error.message), error.reason.value.exit_code)
