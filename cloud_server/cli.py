"""`hybridsd-cloud`: serve models, or check that they can be served.

Every flag is also a variable HYBRIDSD_CLOUD_...; a flag wins. Knows nothing of gRPC.
"""

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import structlog

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core logs each handshake that fails; read at the import of grpc

from cloud_server import logs, preflight
from cloud_server.jobs_cli import jobs
from cloud_server.models_cli import models as models_commands
from cloud_server.settings import MAX_HEARTBEAT_S, MAX_WAIT_S, Settings
from cloud_server.tokens_cli import tokens
from hybridsd import certificates, tracing
from hybridsd.tokens import Tokens, warn_of_readers

if TYPE_CHECKING:
    from cloud_server.metrics import Metrics
    from cloud_server.models.devices import Placement
    from cloud_server.models.load import Model, ModelSpec
    from cloud_server.models.loras import LoraSource
    from cloud_server.models.registry import ModelRegistry

F = TypeVar("F", bound=Callable[..., Any])
log = structlog.get_logger()

EXIT_LOST = 70
"""Of a server that cannot work any more: start it again."""
PREFIX = "HYBRIDSD_CLOUD_"
_TLS_FILES = ("tls_cert", "tls_key", "tls_dir", "tls_client_ca")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def _option(flag: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    """Returns a click option that can also come from the environment."""
    variable = PREFIX + flag.lstrip("-").replace("-", "_").upper()
    return click.option(flag, *names, envvar=variable, show_envvar=True, show_default=True, **attributes)


_MODEL_OPTIONS = (
    _option("--model", "models", multiple=True, required=True, metavar="[ID=]PATH_OR_HUB_ID",
            help="A Stable Diffusion model: a folder or hub id in diffusers layout, the folder of a U-Net, or a "
            "checkpoint in one .safetensors file; ?variant=fp16 behind it chooses weights. Repeatable; the first is "
            "the default."),
    _option("--variant", help="Which weights of all models, such as fp16; else the plain ones, or the only ones."),
    _option("--config", "configs", multiple=True, metavar="[ID=]PATH_OR_HUB_ID",
            help="Diffusers layout with what a model lacks: configurations and tokenizers of a checkpoint in one file, "
            "all but the U-Net for a U-Net. Repeatable."),
    _option("--lora", "loras", multiple=True, metavar="[MODEL:]NAME=PATH_OR_HUB_ID",
            help="A LoRA adapter that requests may ask for by name. Repeatable."),
    _option("--device", default="auto", metavar="DEVICE[,DEVICE...]", help="Where models run: auto (one GPU, else the "
            "CPU), cpu, cuda, cuda:1, or all GPUs with all. Each of several, as cuda:0,cuda:1 or cpu*2, is a worker "
            "with models of its own; one queue is in front of them."),
    _option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", help="Of the U-Net."),
    _option("--latent-space", help="Name of the models' latent space, where their folders do not say."),
    _option("--threads", type=click.IntRange(1),
            help="Threads of a U-Net call on the CPU, of each worker. Default: torch's choice, divided among them."),
    _option("--log-format",
            type=click.Choice(["auto", "console", "json"]), default="auto", help="Of the log."),
)  # fmt: skip
_CERTIFICATE_OPTIONS = (
    _option("--host", default="127.0.0.1", help="Address to listen on."),
    _option("--tls-cert", type=_FILE, help="Certificate chain, PEM. Without one, a server beyond this machine makes "
            "its own, and logs the fingerprint."),
    _option("--tls-dir", type=click.Path(file_okay=False, path_type=Path),
            help="Folder of the certificate that is made. Default: in the user's folder of states."),
    _option("--tls-name", "tls_names", multiple=True, metavar="NAME",
            help="Host name or address that a certificate that is made is for, beside those of this machine. "
            "Repeatable."),
)  # fmt: skip
_SERVE_OPTIONS = (
    *_CERTIFICATE_OPTIONS,
    _option("--port", type=click.IntRange(0, 65535), default=50051, help="0 takes a free one."),
    _option("--port-file", type=click.Path(dir_okay=False, path_type=Path), help="File to write the port to."),
    _option("--tls-key", type=_FILE, help="Private key, PEM."),
    _option("--tls-client-ca", type=_FILE, help="PEM file of the authority that signs certificates of callers: each "
            "must have one, whose name is who calls."),
    _option("--insecure", is_flag=True, help="Speak plain text beyond this machine."),
    _option("--token-file", type=_FILE, help="File with the tokens of which callers must send one: named and hashed, "
            "as `hybridsd-cloud tokens` makes it, or as plain text, one a line. It is read again when it changes."),
    _option("--max-batch", type=click.IntRange(1, 256), default=8, help="Jobs in one U-Net call."),
    _option("--max-queue", type=click.IntRange(1), default=32, help="Jobs that may wait."),
    _option("--prefix-cache", "prefix_cache_mib", type=click.IntRange(0, 2**20), default=256, metavar="MIB",
            help="Memory for states of jobs, which answer the same request of the same caller at once; 0: none."),
    _option("--max-size", type=click.IntRange(8), help="Largest width and height; else twice the models' default."),
    _option("--memory-budget", type=click.FloatRange(0, min_open=True), metavar="GIB", help="What weights of models "
            "may take of each device; those that were used least recently make room for others. No limit if not set."),
    _option("--load-nice", type=click.IntRange(0, 19), default=19, help="Of the process that loads a model beside "
            "steps: 0 loads fast, 19 takes of the processor what steps leave."),
    _option("--bundle", "bundles", type=_FOLDER, multiple=True, help="Edge bundle to hand out. Repeatable."),
    _option("--metrics-port", type=click.IntRange(0, 65535), help="Port for /healthz, /readyz and /metrics in HTTP; "
            "0 takes a free one. None if not set."),
    _option("--metrics-host", default="127.0.0.1", help="Address to listen on for them."),
    _option("--drain-timeout", "drain_timeout_s",
            type=click.FloatRange(0), default=30.0, help="Seconds for jobs to finish on SIGTERM."),
    _option("--heartbeat", "heartbeat_s",
            type=click.FloatRange(0.1, MAX_HEARTBEAT_S), default=5.0, help="Seconds of silence before a heartbeat."),
    _option("--stall-timeout", "stall_timeout_s",
            type=click.FloatRange(1), default=60.0, help="Seconds a step may take; more, and jobs end with UNAVAILABLE "
            "and health is NOT_SERVING."),
    _option("--joules-per-mac", type=click.FloatRange(0, 1e-6, min_open=True), help="Of this device, to model the "
            "energy of jobs where no counter can be read; else that of its class (docs/energy.md)."),
    _option("--watts", type=click.FloatRange(0, 1e5, min_open=True), help="Of this device under load: models energy by "
            "time instead."),
    _option("--traces", type=click.Choice(["none", "otlp"]), default="none", help="Where spans go; otlp: to an "
            "OpenTelemetry collector, as the OTEL_* variables say. They hold no prompts."),
    _option("--stall-exit", "stall_exit_s",
            type=click.FloatRange(1), default=300.0, help=f"Seconds a step may take; more, and the process exits with "
            f"{EXIT_LOST}, to be started again."),
)  # fmt: skip


def _options(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hybridsd")
def main() -> None:
    """Hybrid SD, the cloud side: begins images that edge devices finish."""


main.add_command(tokens)
main.add_command(jobs)
main.add_command(models_commands)


@contextmanager
def _importing() -> Iterator[None]:
    """Imports without rounds of the garbage collector, and takes what they leave out of later ones.

    torch and diffusers are 400,000 objects that stay: to look at them again and again is a seventh of a server's start,
    and each full round later would hold up steps and streams for a quarter of a second. Models may go again: they are
    loaded afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@main.command()
@_options(*_MODEL_OPTIONS, *_SERVE_OPTIONS)
def serve(log_format: logs.LogFormat, token_file: Path | None, **options: Any) -> None:
    """Serves models until SIGTERM or SIGINT; running jobs then finish.

    Exits with 70 when it cannot work any more: its device is lost, or a step is stuck.
    """
    settings = _settings(tokens=_tokens(token_file), **options)
    logs.configure(log_format)
    log.info("settings", **_shown(settings))
    if token_file is not None:
        _warn_of_readers(token_file)
    if settings.port_file is not None:
        settings.port_file.unlink(missing_ok=True)  # an old one would send scripts to a dead port
    try:
        preflight.check(settings)
        settings = preflight.provide_certificate(settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with _importing():
        from cloud_server.models.load import ModelError
        from cloud_server.rpc import server as process  # torch and diffusers take seconds to import; --help must not
    from hybridsd.errors import HybridSDError

    try:
        tracing.switch_on("hybridsd-cloud", settings.traces)
        loaded = load(settings)

        def on_listening(port: int) -> None:
            if settings.port_file is not None:
                part = settings.port_file.with_name(settings.port_file.name + ".part")
                part.write_text(f"{port}\n", encoding="utf-8")
                part.replace(settings.port_file)  # readers see no file or all of it

        if asyncio.run(process.run(**loaded, on_listening=on_listening)) is False:
            _exit_now(0)
    except process.EngineLost as error:
        log.critical("engine_lost", message=str(error))
        _exit_now(EXIT_LOST)
    except (ModelError, HybridSDError, OSError) as error:
        raise click.UsageError(str(error)) from error
    finally:
        tracing.switch_off()


@main.command()
@_options(*_MODEL_OPTIONS)
def check(log_format: logs.LogFormat, **options: Any) -> None:
    """Loads the models, runs one step of each, and says what was found."""
    settings = _settings(**options)
    logs.configure(log_format, level=30)
    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    from cloud_server.models.check import check_model
    from cloud_server.models.load import ModelError

    for key in ("models", "variant", "configs", "loras", "device", "dtype", "latent_space", "threads"):
        click.echo(f"{key + ':':<14}{_shown(settings)[key]}")
    try:
        placements = _placements(settings)
        click.echo()
        for placement in placements:
            click.echo(
                f"runs on {placement.device} ({placement.device_reason}), in {placement.dtype}"
                f" ({placement.dtype_reason})"
            )
        for spec in _specs(settings):
            model = _load_model(spec, placements[0], settings)
            click.echo(f"\nmodel {model.info.id}")
            for line in check_model(model):
                click.echo(f"  {line}")
    except ModelError as error:
        raise click.UsageError(str(error)) from error
    except (ValueError, RuntimeError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(70)


@main.command()
@_options(*_CERTIFICATE_OPTIONS)
@_option("--pem", "as_pem", is_flag=True, help="Print the certificate itself, as clients' --tls-ca takes it.")
def fingerprint(as_pem: bool, **options: Any) -> None:
    """Prints the SHA-256 fingerprint of the server's certificate, which clients pin with --tls-fingerprint.

    Makes the certificate, if the server is to make its own and has not yet.
    """
    logs.configure("console", level=30)
    cert, tls_dir = options.pop("tls_cert"), options.pop("tls_dir")
    try:
        if cert is None:
            settings = Settings(models=(), tls_dir=tls_dir or preflight.default_tls_dir(), **options)
            cert = preflight.provide_certificate(settings).tls_cert
        content = cert.read_bytes()
        click.echo(
            certificates.certificate_only(content) if as_pem else certificates.show(certificates.fingerprint(content)),
            nl=not as_pem,
        )
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error


@main.command()
@_option("--server", default="127.0.0.1:50051", help="The server, as host:port.")
@_option("--tls", is_flag=True, help="Speak TLS; on this machine, any certificate is good.")
@_option("--tls-ca", type=_FILE, help="Speak TLS; PEM file of the authority of its certificate.")
@_option("--tls-fingerprint", metavar="SHA256", help="Speak TLS; the certificate has this fingerprint.")
@_option("--client-cert", type=_FILE, help="Certificate to show, PEM, where the server asks for one.")
@_option("--client-key", type=_FILE, help="Its private key, PEM.")
@_option("--timeout", "timeout_s", type=click.FloatRange(0.1), default=3.0, help="Seconds.")
def probe(server: str, timeout_s: float, **options: Any) -> None:
    """Asks a server whether it serves, by gRPC's health protocol; exit code 4 if not. For health checks."""
    if not timeout_s <= MAX_WAIT_S:
        raise click.UsageError(f"--timeout is {timeout_s:g} s; choose 0.1 to {MAX_WAIT_S:g}")
    from cloud_server.rpc import probe as probing

    try:
        trust = probing.Trust(**options)
        answer = probing.ask(server, timeout_s, trust)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        click.echo(f"Error: {probing.say_away(server, str(error), trust)}", err=True)
        sys.exit(4)
    click.echo(answer)
    if answer != "SERVING":
        sys.exit(4)


def read_options(arguments: Sequence[str]) -> Settings:
    """Returns the settings of `hybridsd-cloud serve` with these arguments and this environment, without serving.

    Configures the log as well. For processes of others that serve: deploy/ray.

    Raises:
        click.ClickException: Saying what is wrong.
    """
    options = dict(serve.make_context("hybridsd-cloud serve", list(arguments)).params)
    logs.configure(options.pop("log_format"))
    return _settings(tokens=_tokens(options.pop("token_file")), **options)


def load(settings: Settings) -> dict[str, Any]:
    """Loads what a server hands out, models and bundles.

    Returns:
        The arguments of `CloudServer`, and of `run` beside it.

    Raises:
        ModelError, HybridSDError, OSError, click.UsageError: Saying what cannot be served.
    """
    from cloud_server.metrics import Metrics
    from cloud_server.models.load import ModelError
    from cloud_server.rpc.bundle_service import load_bundle

    settings = _leave_threads_to_the_engine(settings)
    bundles = [load_bundle(folder) for folder in settings.bundles]
    if len({bundle.name for bundle in bundles}) < len(bundles):
        raise ModelError(f"two bundles have one name: {', '.join(sorted(bundle.name for bundle in bundles))}")
    metrics = Metrics()
    registry = _registry(settings, _placements(settings), metrics)
    return {"settings": settings, "models": registry, "bundles": bundles, "metrics": metrics}


def _settings(**options: Any) -> Settings:
    from cloud_server.models.sources import parse_source

    try:
        settings = Settings(**options)
        preflight.check_ids("--model", [parse_source(source).id for source in settings.models])
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return settings


def _shown(settings: Settings) -> dict[str, object]:
    """Returns the settings for people to read; of the tokens only how many there are."""
    shown = {item.name: getattr(settings, item.name) for item in fields(settings) if item.name != "tokens"}
    return {
        **{key: list(map(str, value)) if isinstance(value, tuple) else value for key, value in shown.items()},
        "port_file": str(settings.port_file) if settings.port_file else None,
        "num_tokens": None if settings.tokens is None else len(settings.tokens.all),
        **{key: None if shown[key] is None else str(shown[key]) for key in _TLS_FILES},
    }


def _warn_of_readers(token_file: Path) -> None:
    if warning := warn_of_readers(token_file):
        log.warning("token_file_readable", message=warning)


def _tokens(path: Path | None) -> Tokens | None:
    def on_reload(wrong: str | None) -> None:
        if wrong is None and path is not None:
            log.info("tokens_read", path=str(path))
            _warn_of_readers(path)
        else:
            log.error("tokens_not_read", message=f"{wrong}; the tokens of before stay good until the file is mended")

    try:
        return None if path is None else preflight.read_tokens(path, on_reload=on_reload)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _exit_now(code: int) -> None:
    """Ends the process without waiting for threads, of which one is stuck."""
    tracing.switch_off()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _placements(settings: Settings) -> "list[Placement]":
    from cloud_server.models.devices import place_all

    try:
        return place_all(settings.device, settings.dtype)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _leave_threads_to_the_engine(settings: Settings) -> Settings:
    """Keeps this thread, which loads the models, from making a pool of OpenMP threads.

    With a second pool beside the engine's there are more threads than cores, and libgomp puts waiting ones to sleep:
    `make bench` then gave 1.35 for hybrid over gRPC against one process, 0.98 without it (2 cores).
    """
    import torch

    num_workers = len(_placements(settings))
    threads = max(1, torch.get_num_threads() // num_workers) if settings.threads is None else settings.threads
    torch.set_num_threads(1)
    return replace(settings, threads=threads)


def _registry(settings: Settings, placements: "Sequence[Placement]", metrics: "Metrics") -> "ModelRegistry":
    """Loads the models onto the devices, as far as the budget of memory goes; the others wait until they are needed."""
    from cloud_server.models.load import ModelError, import_networks
    from cloud_server.models.registry import GIB, ModelRegistry

    dtypes = {placement.dtype for placement in placements}
    if len(dtypes) > 1:
        raise ModelError("the devices are best at different precisions; choose one for all with --dtype")
    (dtype,) = dtypes
    specs = _specs(settings)
    with _importing():
        import_networks()
    registry = ModelRegistry(
        [placement.device for placement in placements],
        dtype=dtype,
        budget_bytes=None if settings.memory_budget is None else int(settings.memory_budget * GIB),
        max_size=settings.max_size,
        load_nice=settings.load_nice,
        metrics=metrics,
    )
    for spec in specs:
        if settings.memory_budget is not None:
            described = spec.describe(dtype)
            if not registry.fits(described.size_bytes):
                registry.know(spec, described)
                log.info("model_known", model=spec.id, size_bytes=described.size_bytes, message="loaded when needed")
                continue
        registry.adopt(_load_model(spec, placements[0], settings), spec)
    return registry


def _specs(settings: Settings) -> "list[ModelSpec]":
    """Returns the models that are to be served, whose files are there as far as this machine knows."""
    from cloud_server.models.load import ModelError, ModelSpec, config_for, size_multiple
    from cloud_server.models.sources import locate, parse_source

    loras = _loras(settings)
    served = {parse_source(source).id for source in settings.models}
    named = {text.partition("=")[0] for text in settings.configs if "=" in text} | {lora.model for lora in loras}
    if unknown := sorted(named - served - {""}):
        raise ModelError(f"--config or --lora is for {unknown[0]!r}; the models are {', '.join(sorted(served))}")
    for source in settings.models:  # before the first is loaded
        parsed = parse_source(source, variant=settings.variant)
        if Path(parsed.where).exists():
            files = locate(parsed, config_for(parsed.id, settings.configs))
            if settings.max_size is not None:
                _check_max_size(settings, parsed.id, size_multiple(files))
    logs.quiet_libraries()
    return [
        ModelSpec(
            source=source, latent_space=settings.latent_space, variant=settings.variant, configs=settings.configs,
            loras=tuple(lora for lora in loras if lora.model in ("", parse_source(source).id)),
        )
        for source in settings.models
    ]  # fmt: skip


def _check_max_size(settings: Settings, model: str, multiple: int) -> None:
    from cloud_server.models.load import ModelError

    if settings.max_size is not None and settings.max_size < multiple:
        raise ModelError(
            f"--max-size is {settings.max_size}, but model {model} takes multiples of {multiple} pixels; choose at"
            " least that"
        )


def _load_model(spec: "ModelSpec", placement: "Placement", settings: Settings) -> "Model":
    started_s = time.monotonic()
    model = spec.load(placement)
    _check_max_size(settings, model.info.id, model.info.size_multiple)  # of one from the hub
    log.info(
        "model_loaded",
        model=model.info.id,
        latent_space=model.info.latent_space,
        num_parameters=model.info.num_parameters,
        device=f"{placement.device} ({placement.device_reason})",
        dtype=f"{placement.dtype} ({placement.dtype_reason})",
        elapsed_s=round(time.monotonic() - started_s, 3),
    )
    return model


def _loras(settings: Settings) -> "list[LoraSource]":
    """Returns the adapters, whose names and files are there as far as this machine knows."""
    if not settings.loras:
        return []
    from cloud_server.models.loras import check_sources, parse_source  # peft takes seconds to import
    from cloud_server.models.sources import parse_source as parse_model

    loras = [parse_source(text) for text in settings.loras]
    for model in settings.models:
        check_sources([lora for lora in loras if lora.model in ("", parse_model(model).id)])
    return loras


if __name__ == "__main__":
    main()
