"""`hybridsd-cloud models`: what a running server has loaded; loads and unloads models and adapters."""

from pathlib import Path
from typing import Any

import click

from cloud_server.calling import calling, connection, echo_table
from cloud_server.settings import is_loopback

LOAD_S = 1800.0
"""For a load, downloads included."""
GIB, MIB = 2**30, 2**20
_timeout = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0.1, 86_400), default=LOAD_S, show_default=True,
    help="Seconds to wait for it; it goes on afterwards.",
)  # fmt: skip
_owner = click.option("--token", "owner", default="", metavar="NAME", help="Of the token that alone has it; else all.")
_model = click.option("--model", default="", metavar="ID", help="Of which model; the server's first if not set.")


@click.group()
def models() -> None:
    """Lists, loads and unloads the models of a running server. With tokens, it takes one with the scope admin."""


@models.command("list")
@connection
def list_(server: str, **options: Any) -> None:
    """Prints the models that the server knows, their adapters, and what they take of its devices."""
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        answer = stub.ListModels(pb.ListModelsRequest(), **call)
    echo_table([
        ("ID", "STATE", "SIZE", "DEVICES", "ADAPTERS", "SOURCE"),
        *((model.id, _state(model), _size(model.size_bytes), _devices(model), _loras(model),
           model.source.removeprefix(f"{model.id}=") or "-") for model in answer.models),
    ])  # fmt: skip
    for model in answer.models:
        for on in model.devices:
            if on.error:
                click.echo(f"{model.id} on {on.device}: {on.error}", err=True)
    for device in answer.devices:
        used = _size(device.used_bytes) if device.used_bytes else "nothing"
        budget = f" of {_size(device.budget_bytes)}" if device.budget_bytes else ""
        click.echo(f"{device.device}: models take {used}{budget}")


@models.command()
@click.argument("source", metavar="[ID=]PATH_OR_HUB_ID")
@click.option("--variant", default="", help="Which weights, such as fp16; else the plain ones, or the only ones.")
@click.option("--config", default="", metavar="PATH_OR_HUB_ID",
              help="Diffusers layout with what the model lacks: see `hybridsd-cloud serve --config`.")  # fmt: skip
@click.option("--latent-space", default="", help="Name of its latent space, where its folder does not say.")
@click.option("--lora", "loras", multiple=True, metavar="NAME=PATH_OR_HUB_ID", help="An adapter for all. Repeatable.")
@_timeout
@connection
def load(
    source: str, variant: str, config: str, latent_space: str, loras: tuple[str, ...], server: str, **options: Any
) -> None:
    """Loads a model beside what the server computes, and waits until it can be asked for.

    Paths are on the server's machine. The id of a model that is known loads that one.
    """
    name, equals, where = source.partition("=")
    name, where = (name, where) if equals and "?" not in name else ("", source)
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        known = {model.id for model in stub.ListModels(pb.ListModelsRequest(), **call).models} if not name else set()
        if where in known:
            name, where = where, ""
        answer = stub.LoadModel(
            pb.LoadModelRequest(
                id=name, source=_path(where, server), variant=variant, config=_path(config, server),
                latent_space=latent_space, loras=[_lora(lora, server) for lora in loras],
            ),
            **call,
        )  # fmt: skip
    click.echo(f"{answer.model.id} is loaded, {_size(answer.model.size_bytes)} on {_devices(answer.model)}", err=True)


@models.command()
@click.argument("model")
@click.option("--drain", is_flag=True, help="Wait for its jobs instead of refusing; new ones are refused meanwhile.")
@click.option("--keep", is_flag=True, help="Free its memory only: it is loaded again when a job needs it.")
@_timeout
@connection
def unload(model: str, drain: bool, keep: bool, server: str, **options: Any) -> None:
    """Lets go of a model, also of one that is being loaded, and waits until it is gone."""
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        stub.UnloadModel(pb.UnloadModelRequest(id=model, drain=drain, keep=keep), **call)
    click.echo(f"{model} is unloaded", err=True)


@models.group()
def lora() -> None:
    """Loads and unloads adapters of models, for everybody or for one token."""


@lora.command("load")
@click.argument("source", metavar="NAME=PATH_OR_HUB_ID")
@_model
@_owner
@_timeout
@connection
def load_lora(source: str, model: str, owner: str, server: str, **options: Any) -> None:
    """Loads an adapter into a model, and waits until it can be asked for."""
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        answer = stub.LoadLora(pb.LoadLoraRequest(model=model, lora=_lora(source, server), owner=owner), **call)
    click.echo(f"{answer.lora.name} is loaded, {answer.lora.num_parameters:,} parameters", err=True)


@lora.command("unload")
@click.argument("name")
@_model
@_owner
@connection
def unload_lora(name: str, model: str, owner: str, server: str, **options: Any) -> None:
    """Lets nobody ask for an adapter any more; jobs that use it go on."""
    with calling(server, **options) as (channel, call):
        pb, stub = _service(channel)
        stub.UnloadLora(pb.UnloadLoraRequest(model=model, name=name, owner=owner), **call)
    click.echo(f"{name} is unloaded", err=True)


def _service(channel: Any) -> tuple[Any, Any]:
    from hybridsd.v1 import model_service_pb2, model_service_pb2_grpc

    return model_service_pb2, model_service_pb2_grpc.ModelServiceStub(channel)


def _path(where: str, server: str) -> str:
    """Returns what a server of this machine finds from wherever it was started."""
    path, mark, variant = where.partition("?")
    is_here = is_loopback(server.rpartition(":")[0]) and where and Path(path).exists()
    return f"{Path(path).resolve()}{mark}{variant}" if is_here else where


def _lora(text: str, server: str) -> Any:
    from hybridsd.v1 import model_service_pb2 as pb

    name, equals, where = text.partition("=")
    if not equals:
        raise click.UsageError(f"the adapter is {text[:80]!r}; give NAME=PATH_OR_HUB_ID")
    return pb.LoraSource(name=name, source=_path(where, server))


def _state(model: Any) -> str:
    from hybridsd.v1 import denoising_service_pb2 as pb

    state = pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()
    return f"{state}, leaving" if model.is_leaving else state


def _devices(model: Any) -> str:
    from hybridsd.v1 import denoising_service_pb2 as pb

    return ",".join(on.device for on in model.devices if on.state == pb.MODEL_STATE_WARM) or "-"


def _loras(model: Any) -> str:
    return ",".join(f"{lora.owner}/{lora.name}" if lora.owner else lora.name for lora in model.loras) or "-"


def _size(num_bytes: int) -> str:
    if not num_bytes:
        return "-"
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
