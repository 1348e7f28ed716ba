"""The command line: flags and variables, refusals, `check`, and a real process that is told to stop."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from click.testing import CliRunner

import cloud_server.rpc.server
from cloud_server import cli
from cloud_server.cli import main
from cloud_server.metrics import Metrics
from cloud_server.models.devices import place
from cloud_server.models.load import ModelError, ModelSpec, load_model
from cloud_server.settings import Settings
from hybridsd.tokens import add_token
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.support.loading import write_models


def test_check_says_what_was_found(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, device and dtype with reasons, parameters, time of a step; settings come from variables too."""
    monkeypatch.setenv("HYBRIDSD_CLOUD_MODEL", f"mine={tiny_folder}")
    monkeypatch.setenv("HYBRIDSD_CLOUD_DTYPE", "bf16")
    result = CliRunner().invoke(main, ["check", "--device", "cpu", "--threads", "1"])

    assert result.exit_code == 0, result.output
    for words in ("mine", "torch.bfloat16 (chosen)", "cpu (chosen)", "parameters", "one guided step", "ok"):
        assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0", "--tls-dir", "/dev/null/tls"], "--insecure"),
        (["--tls-name", "no name"], "--tls-name 'no name'"),
        (["--host", "0.0.0.0", "--insecure", "--tls-client-ca", __file__], "--tls-client-ca needs TLS"),
        (["--metrics-host", "0.0.0.0"], "without --metrics-port; give a port"),
        (["--metrics-host", "0.0.0.0", "--metrics-port", "0"], "plain text; give --tls-name"),
        (["--port", "70000"], "70000"),
        (["--device", "tpu"], "device is 'tpu'; choose auto, cpu, cuda, cuda:0, ..., or all"),
        (["--device", "cpu,cpu*x"], "device is 'cpu*x'; write NAME*TIMES with times from 1 to 64, as cpu*2"),
        (["--device", "cpu*40,cpu*40"], "device names 80 workers; choose at most 64"),
        (["--device", "cuda:99"], "device is cuda:99, but torch finds"),
        (["--tls-cert", __file__], "go together"),
        (["--bundle", "."], "model.json"),
        (["--model", "no/such/model"], "neither a folder nor a hub id"),
    ],
)
def test_wrong_usage_exits_with_2(tiny_folder: Path, arguments: list[str], says: str) -> None:
    """What cannot be served is said before anything is."""
    result = CliRunner().invoke(main, ["serve", "--model", str(tiny_folder), *arguments])

    assert result.exit_code == 2, result.output
    assert says in result.output


def test_an_empty_token_file_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """An empty token would let everybody in."""
    (tmp_path / "token").write_text("\n")
    result = CliRunner().invoke(main, ["serve", "--model", str(tiny_folder), "--token-file", str(tmp_path / "token")])

    assert result.exit_code == 2
    assert "empty" in result.output


@pytest.mark.slow
async def test_a_process_serves_and_stops(tiny_folder: Path, tmp_path: Path) -> None:
    """The port is written, an image begun, and SIGTERM ends the process with 0."""
    port_file = tmp_path / "port"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cloud_server.cli", "serve", "--model", f"tiny={tiny_folder}", "--port", "0",
        "--port-file", str(port_file), "--threads", "1", "--device", "cpu*2",
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while not port_file.exists() and process.returncode is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port_file.read_text().strip()}") as channel:
            stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
            request = pb.DenoiseRequest(text=pb.TextConditioning(prompt="a fox"), handoff_step=2)
            kinds = [str(answer.WhichOneof("event")) async for answer in stub.Denoise(request)]
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert kinds[-1] == "finished"
    assert process.returncode == 0
    assert b'"stopped"' in errors
    assert b"a fox" not in errors


def test_threads_are_left_to_the_engine(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that loads the models makes no OpenMP pool; the engine is told how many threads it may have."""
    seen: list[tuple[int | None, int]] = []

    async def run(settings: Settings, *_: object, **__: object) -> None:
        seen.append((settings.threads, torch.get_num_threads()))

    monkeypatch.setattr(cloud_server.rpc.server, "run", run)
    before = torch.get_num_threads()
    try:
        for flags in ([], ["--threads", "3"], ["--device", "cpu*2"]):
            torch.set_num_threads(2)
            result = CliRunner().invoke(main, ["serve", "--model", str(tiny_folder), "--port", "0", *flags])
            assert result.exit_code == 0, result.output
    finally:
        torch.set_num_threads(before)

    assert seen == [(2, 1), (3, 1), (1, 1)]  # two workers have half each


@pytest.mark.parametrize("option", ["--heartbeat", "--drain-timeout", "--stall-timeout", "--stall-exit"])
def test_times_are_numbers(tiny_folder: Path, option: str) -> None:
    """NaN, which no comparison finds too large, is refused before a model is loaded."""
    result = CliRunner().invoke(main, ["serve", "--model", str(tiny_folder), option, "nan"])

    assert (result.exit_code, f"{option} is nan s; choose at most" in result.output) == (2, True), result.output


def test_the_time_of_a_probe_is_a_number() -> None:
    """NaN is no time."""
    for seconds in ("nan", "inf"):
        result = CliRunner().invoke(main, ["probe", "--timeout", seconds])
        assert (result.exit_code, "--timeout is" in result.output) == (2, True), result.output


def test_a_broken_edit_of_the_tokens_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Loudly, with what is wrong; the tokens of before stay good, and a good edit counts again."""
    monkeypatch.setattr("hybridsd.tokens.RELOAD_S", 0.0)
    path = tmp_path / "tokens"
    secret = add_token(path, "alice")
    found = cli._tokens(path)
    assert found is not None
    good = path.read_text()
    path.write_text(good + "[bob\n")
    for _ in range(3):
        assert found.find(secret) is not None
    (line,) = [line for line in log_lines() if line["event"] == "tokens_not_read"]
    assert line["level"] == "error"
    assert str(path) in line["message"]
    other = add_token(tmp_path / "other", "carol")
    (tmp_path / "other").replace(path)
    assert (found.find(secret), found.find(other) is None) == (None, False)
    assert [line["event"] for line in log_lines()][-1] == "tokens_read"


def test_models_beyond_the_budget_wait_until_they_are_needed(tmp_path: Path) -> None:
    """In the order in which they are given; what is said of one that is not loaded is whole."""
    folders = write_models(tmp_path, "first", "second")
    names = tuple(str(folder) for folder in folders.values())
    size_bytes = ModelSpec(source=names[0]).describe(torch.float32).size_bytes
    settings = Settings(models=names, device="cpu*2", dtype="fp32", memory_budget=1.5 * size_bytes / 2**30)
    registry = cli._registry(settings, cli._placements(settings), Metrics())
    assert [(view.id, view.state.value) for view in registry.views()] == [("first", "warm"), ("second", "cold")]
    loaded = load_model(names[1], place("cpu", "fp32")).info
    assert registry.catalog["second"].info == replace(loaded, text_encoder_digest=b"")  # which is of weights
    with pytest.raises(ModelError, match="--memory-budget is"):
        cli._registry(replace(settings, memory_budget=1e-9), cli._placements(settings), Metrics())


def test_what_is_imported_is_no_work_for_the_collector() -> None:
    """It is off meanwhile, on afterwards, and does not look at what was there again."""
    gc.unfreeze()
    with cli._importing():
        assert not gc.isenabled()

    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
