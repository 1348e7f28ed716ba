"""The commands `tokens` and `jobs` of the cloud."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from cloud_server.cli import main
from cloud_server.models.load import Model, ModelSpec
from cloud_server.models.registry import ModelRegistry
from hybridsd.tokens import Quota, Tokens, add_token, hash_token
from tests.support.engine_fakes import Client, GatedDenoiser, message
from tests.support.loading import CPU, QuickLoader, write_loras, write_models

StartServer = Callable[..., Awaitable[Client]]


def tokens(*arguments: str, file: Path) -> Result:
    return CliRunner().invoke(main, ["tokens", *arguments, "--file", str(file)])


def test_a_token_is_made_listed_and_removed(tmp_path: Path) -> None:
    """Its secret is on standard output, once and alone; the file and the list do not have it."""
    path = tmp_path / "tokens.toml"
    made = tokens(
        "add", "alice", "--scope", "generate", "--scope", "priority", "--expires", "90d", "--weight", "2",
        "--jobs", "4", "--queued", "0", "--steps-per-minute", "600", "--pixels", "262144", "--bytes", "1", file=path,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    (token,) = Tokens(path).all
    assert token.sha256 == hash_token(secret)
    assert (token.name, token.scopes, token.weight) == ("alice", {"generate", "priority"}, 2.0)
    assert token.quota == Quota(jobs=4, queued=0, steps_per_minute=600, pixels=262144, bytes=1)
    assert token.expires is not None

    listed = tokens("list", file=path)
    assert "generate,priority" in listed.stdout
    assert "jobs=4 queued=0" in listed.stdout
    for shown in (listed.output, made.stderr):
        assert secret not in shown
        assert token.sha256.hex() not in shown
    assert tokens("remove", "alice", file=path).exit_code == 0
    assert Tokens(path).all == ()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "a b"], "the name"),
        (["add", "bob"], "already"),
        (["add", "carol", "--expires", "soon"], "90d"),
        (["add", "carol", "--jobs", "0"], "--jobs"),
        (["add", "carol", "--scope", "root"], "priority"),
        (["remove", "carol"], "it has bob"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, arguments: list[str], says: str) -> None:
    """With exit code 2, and the file stays as it is."""
    path = tmp_path / "tokens.toml"
    add_token(path, "bob")
    before = path.read_bytes()
    result = tokens(*arguments, file=path)
    assert result.exit_code == 2
    assert says in result.output
    assert path.read_bytes() == before


def test_help_imports_neither_grpc_nor_torch() -> None:
    """So that it is there at once."""
    code = "import sys, cloud_server.cli; sys.exit(bool({'grpc', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_jobs_are_listed_and_stopped(start_server: StartServer, gated: GatedDenoiser, tmp_path: Path) -> None:
    """An admin sees the jobs of all and stops them; others see and stop their own."""
    path = tmp_path / "tokens"
    secrets = {name: add_token(path, name) for name in ("alice", "bob")}
    secrets["nobody"] = "a-token-that-nobody-has"
    secrets["root"] = add_token(path, "root", scopes=frozenset({"admin"}))
    client = await start_server(denoiser=gated, max_batch=1, tokens=Tokens(path))
    address = f"127.0.0.1:{client.server.port}"

    async def jobs(name: str, *arguments: str) -> Result:
        (tmp_path / name).write_text(secrets[name])
        command = ["jobs", *arguments, "--server", address, "--token-file", str(tmp_path / name)]
        return await asyncio.to_thread(CliRunner().invoke, main, command)

    metadata = (("authorization", f"Bearer {secrets['alice']}"), ("x-hybridsd-user", "ann"))
    call = asyncio.create_task(client.denoise(message(request_id="fox"), metadata=metadata))
    await asyncio.to_thread(gated.entered.acquire)

    listed = await jobs("root", "list")
    assert listed.exit_code == 0, listed.output
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("fox")]
    assert line.split()[:7] == ["fox", "alice", "ann", "tiny", "running", "0/4", "-"]
    assert "fox" not in (await jobs("bob", "list")).output
    stranger = await jobs("nobody", "list")
    assert (stranger.exit_code, "give the right one with --token-file" in stranger.output) == (3, True)
    refused = await jobs("bob", "cancel", "fox")
    assert (refused.exit_code, "no job fox" in refused.output) == (3, True)
    assert (await jobs("root", "cancel", "fox", "--owner", "bob")).exit_code == 3
    stopped = await jobs("root", "cancel", "fox")
    assert stopped.exit_code == 0, stopped.output
    gated.open()
    with pytest.raises(Exception, match="cancelled"):
        await call


def test_a_server_that_is_away(tmp_path: Path) -> None:
    """Exit code 4, as of the health check."""
    result = CliRunner().invoke(main, ["jobs", "list", "--server", "127.0.0.1:1"])
    assert result.exit_code == 4
    assert "does not answer" in result.output


def test_a_token_is_not_sent_in_plain_text_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who forgets TLS must not give the admin's token away."""
    monkeypatch.setenv("HYBRIDSD_CLOUD_TOKEN", "s3cret")
    result = CliRunner().invoke(main, ["jobs", "list", "--server", "cloud.example:50051"])
    assert result.exit_code == 2
    assert "--tls-fingerprint" in result.output
    assert "s3cret" not in result.output


async def test_models_are_listed_loaded_and_unloaded(
    start_server: StartServer, tiny_model: Model, tmp_path: Path
) -> None:
    """With their adapters; what is wrong is said, with exit code 3 where the server refuses."""
    folders = write_models(tmp_path, "first", "second")
    registry = ModelRegistry([CPU], loader=QuickLoader())
    spec = ModelSpec(source=str(folders["first"]))
    registry.know(spec, spec.describe(torch.float32))
    client = await start_server(registry=registry)

    async def models(*arguments: str) -> Result:
        command = ["models", *arguments, "--server", f"127.0.0.1:{client.server.port}"]
        result = await asyncio.to_thread(CliRunner().invoke, main, command)
        assert result.exit_code in (0, 3), result.output
        return result

    assert (await models("load", f"mine={folders['second']}")).exit_code == 0
    lora = write_loras(tmp_path, tiny_model, "style")["style"]
    loaded = await models("lora", "load", f"style={lora}", "--model", "mine")
    assert "style is loaded, 6,208 parameters" in loaded.output
    rows = {line.split()[0]: line.split() for line in (await models("list")).stdout.splitlines()}
    assert (rows["first"][1], rows["mine"][1]) == ("cold", "warm")
    assert rows["mine"][4:6] == ["cpu", "style"]
    assert rows["mine"][6] == str(folders["second"])
    assert rows["cpu:"][:3] == ["cpu:", "models", "take"]
    refused = await models("lora", "load", f"ink={lora}", "--model", "mine", "--token", "alice")
    assert (refused.exit_code, "leave --token out" in refused.output) == (3, True)
    assert (await models("unload", "mine", "--keep")).exit_code == 0
    assert "cpu: models take nothing\n" in (await models("list")).stdout
    assert (await models("load", "mine")).exit_code == 0
    assert (await models("lora", "unload", "style", "--model", "mine")).exit_code == 0
    assert (await models("load", "first")).exit_code == 0  # one that is known, by its id
    assert (await models("unload", "first")).exit_code == 0
    refused = await models("unload", "first")
    assert (refused.exit_code, "is not served; choose one of mine" in refused.output) == (3, True)
    assert (await models("load", str(tmp_path))).exit_code == 3
    assert [view.id for view in registry.views()] == ["mine"]
