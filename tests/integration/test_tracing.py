"""One image is one trace: spans and logs of command line, gateway and cloud have one trace id and one tree."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cloud_server import logs
from cloud_server.rpc.server import CloudServer
from edge_client.bundles.bundle import Bundle
from edge_client.cli.main import main
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web.app import create_app
from edge_client.web.settings import Settings
from hybridsd import tracing
from tests.support.collector import collector
from tests.support.patience import HANG_S

Connect = Callable[[CloudServer], Cloud]
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "a secret word: xyzzyplugh"
BODY = {
    "prompt": PROMPT, "num_inference_steps": 4, "width": 64, "height": 64, "scheduler": "ddim",
    "hybrid": {"cloud_steps": 2, "fallback": False},
}  # fmt: skip


@pytest.fixture
def spans() -> Iterator[Callable[[], list[ReadableSpan]]]:
    """Records the spans of this process; returns a function that gives those that have ended."""
    exporter = InMemorySpanExporter()
    tracing.install(SimpleSpanProcessor(exporter), "tests")
    yield lambda: list(exporter.get_finished_spans())
    tracing.switch_off()


def until(is_there: Callable[[], bool]) -> None:
    """Waits for what another thread does last."""
    limit = time.monotonic() + HANG_S
    while not is_there():
        assert time.monotonic() < limit
        time.sleep(0.01)


def generate(server: CloudServer, bundle: Bundle, folder: Path, *more: str) -> None:
    main(
        ["generate", PROMPT, "--bundle", str(bundle.folder), "--server", f"127.0.0.1:{server.port}", "--steps", "4",
         "--cloud-steps", "2", "--no-fallback", "-q", "-o", str(folder / "fox.png"), *more],
        standalone_mode=False,
    )  # fmt: skip


def check_tree(spans: list[ReadableSpan], root_parent: str | None) -> dict[str, ReadableSpan]:
    """Checks that spans are one tree; returns them by name."""
    assert len({span.context.trace_id for span in spans}) == 1
    ids = {f"{span.context.span_id:016x}" for span in spans}
    above = [None if span.parent is None else f"{span.parent.span_id:016x}" for span in spans]
    assert [parent for parent in above if parent not in ids] == [root_parent]
    assert PROMPT.split()[-1] not in "".join(span.to_json() for span in spans)
    return {span.name: span for span in spans}


def printed(out: str) -> list[dict[str, Any]]:
    """Returns the images of `--json`, among the lines of a cloud in this process."""
    (line,) = [line for line in out.splitlines() if line.startswith('{"images"')]
    images: list[dict[str, Any]] = json.loads(line)["images"]
    return images


DENOISE = "hybridsd.v1.DenoisingService/Denoise"


def test_an_image_of_the_command_line_is_one_tree(
    spans: Callable[[], list[ReadableSpan]], server: CloudServer, bundle: Bundle, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "switch_off", lambda: None)  # at the end of the command; the cloud is in this process
        generate(server, bundle, tmp_path, "--json")
        until(lambda: any(span.kind.name == "SERVER" for span in spans()))
    written = printed(capsys.readouterr().out)[0]
    found = check_tree(spans(), None)

    assert {"generate", "edge steps", "decode", "unet call", "queue", "encode text", DENOISE} <= set(found)
    assert written["trace_id"] == f"{found['generate'].context.trace_id:032x}"
    assert sum(span.name == "unet call" for span in spans()) == 2
    client, remote = (
        next(span for span in spans() if span.name == DENOISE and span.kind.name == kind)
        for kind in ("CLIENT", "SERVER")
    )
    assert client.parent is not None
    assert remote.parent is not None
    assert client.parent.span_id == found["generate"].context.span_id
    assert remote.parent.span_id == client.context.span_id
    assert dict(remote.attributes or {})["rpc.response.status_code"] == "OK"
    assert dict(found["unet call"].attributes or {})["hybridsd.batch_size"] == 1


def test_a_job_of_the_gateway_goes_on_with_the_trace_of_its_caller(
    spans: Callable[[], list[ReadableSpan]], server: CloudServer, connect: Connect, bundle: Bundle, models: Models,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Browser, gateway and cloud are one tree; the answer, the record and the state of other systems say so."""
    app = create_app(Settings(data_dir=tmp_path / "data"), bundle, models, connect(server))
    with TestClient(app) as client:
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=kept"}
        answer = client.post("/v1/jobs", json=BODY, headers=headers)
        assert answer.status_code < 300, answer.text
        until(lambda: client.get(f"/v1/jobs/{answer.json()['id']}").json()["state"] == "completed")
        job = client.get(f"/v1/jobs/{answer.json()['id']}").json()
        other = client.get("/v1/jobs")

        def ours() -> list[ReadableSpan]:
            return [span for span in spans() if f"{span.context.trace_id:032x}" == TRACE]

        until(lambda: any(span.name == "job" for span in ours()) and len([s for s in ours() if s.name == DENOISE]) == 2)
    found = check_tree(ours(), CALLER)

    assert answer.headers["x-trace-id"] == TRACE == job["images"][0]["trace_id"]
    assert other.headers["x-trace-id"] not in ("", TRACE)
    assert {"POST /v1/jobs", "job", "queue", "generate", "edge steps", DENOISE, "unet call"} <= set(found)
    assert all(span.context.trace_state.get("vendor") == "kept" for span in ours())
    assert found["POST /v1/jobs"].attributes is not None
    assert found["POST /v1/jobs"].attributes["http.response.status_code"] == answer.status_code


def test_a_caller_that_is_not_sampled_leaves_no_spans(
    spans: Callable[[], list[ReadableSpan]], server: CloudServer, connect: Connect, bundle: Bundle, models: Models,
    tmp_path: Path,
) -> None:  # fmt: skip
    app = create_app(Settings(data_dir=tmp_path / "data"), bundle, models, connect(server))
    with TestClient(app) as client:
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
        answer = client.post("/v1/jobs", json=BODY, headers=headers)
        until(lambda: client.get(f"/v1/jobs/{answer.json()['id']}").json()["state"] == "completed")

    assert answer.headers["x-trace-id"] == TRACE
    assert [span.name for span in spans() if f"{span.context.trace_id:032x}" == TRACE] == []


def test_logs_of_gateway_and_cloud_name_the_trace(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, tmp_path: Path
) -> None:
    """Without any tracing: the line of the cloud and the line of the job, though another request began that job."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log = tmp_path / "log"
    with log.open("w") as stream:
        logs.configure("json", stream=stream)
        try:
            app = create_app(Settings(data_dir=tmp_path / "data", workers=1), bundle, models, connect(server))
            with TestClient(app) as client:
                ids = {}
                for trace in (TRACE, TRACE[::-1], TRACE):
                    headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
                    ids[client.post("/v1/jobs", json=BODY, headers=headers).json()["id"]] = trace
                for job_id in ids:
                    until(lambda job_id=job_id: client.get(f"/v1/jobs/{job_id}").json()["state"] == "completed")
        finally:
            root.handlers[:], root.level = handlers, level
            structlog.reset_defaults()
    lines = [json.loads(line) for line in log.read_text().splitlines()]

    ended = {line["job"]: line["trace_id"] for line in lines if line["event"] == "job_ended"}
    assert ended == ids
    denoised = [line["trace_id"] for line in lines if line["event"] == "call" and line["method"] == "Denoise"]
    assert sorted(denoised) == sorted(ids.values())


def test_spans_are_sent_by_otlp_when_the_command_ends(
    server: CloudServer, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real exporter, to where the standard variables say, under the standard names."""
    with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "site=barn")
        generate(server, bundle, tmp_path, "--traces", "otlp")
    groups = [group for message in received for group in message.resource_spans]
    about = {item.key: item.value.string_value for item in groups[0].resource.attributes}
    names = {span.name for group in groups for scope in group.scope_spans for span in scope.spans}

    assert about["service.name"] == "hybridsd"
    assert about["site"] == "barn"
    assert {"generate", "edge steps", "decode", DENOISE} <= names
    assert not tracing.is_on()


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ([], {"OTEL_TRACES_EXPORTER": "otlp"}),
        (["--traces", "otlp"], {"OTEL_SDK_DISABLED": "true"}),
    ],
)
def test_variables_alone_send_nothing(
    options: list[str], variables: dict[str, str], server: CloudServer, bundle: Bundle, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Variables of other programs are no wish; and the one that says no is heeded."""
    with collector() as (url, received):
        for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **variables}.items():
            monkeypatch.setenv(name, value)
        generate(server, bundle, tmp_path, *options)
    assert received == []


def test_the_web_framework_sends_nothing_by_itself(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """FastAPI would export spans, and logs of invalid requests with what they say, where its variable asks for it."""
    with collector() as (url, received):
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        app = create_app(Settings(data_dir=tmp_path / "data"), bundle, models, connect(server))
        with TestClient(app) as client:
            assert client.post("/v1/jobs", json={**BODY, "seed": PROMPT}).status_code == 422
    assert received == []


def test_a_collector_that_does_not_answer_is_not_waited_for(
    server: CloudServer, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    monkeypatch.setattr(tracing.switch_off, "__defaults__", (0.1,))
    with collector(hold) as (url, _):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(2 * int(HANG_S)))
        generate(server, bundle, tmp_path, "--traces", "otlp")
        waiting = [thread.name for thread in threading.enumerate()]
        hold.set()
    assert "hybridsd-spans" in waiting
    assert (tmp_path / "fox.png").is_file()


def test_no_collector_is_one_line(
    server: CloudServer, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    generate(server, bundle, tmp_path, "--traces", "otlp")

    assert (tmp_path / "fox.png").is_file()
    assert [record.getMessage()[:20] for record in caplog.records if "span" in record.getMessage()] in (
        [], ["spans cannot be sent"],
    )  # fmt: skip


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    """And nothing of it is imported where nobody asks for traces."""
    code = """
import sys
from edge_client.cli.main import main
import edge_client.cli.generate, edge_client.web.app, cloud_server.rpc.server, cloud_server.engine.engine
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
sys.modules["opentelemetry.sdk"] = None
main(["generate", "a fox", "--traces", "otlp", "--dry-run"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)

    assert done.returncode == 2, done.stderr
    assert "pip install 'hybridsd[otel]'" in done.stderr


def test_a_trace_of_the_environment_is_gone_on_with(
    server: CloudServer, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-{CALLER}-01")
    generate(server, bundle, tmp_path, "--json")
    assert printed(capsys.readouterr().out)[0]["trace_id"] == TRACE


def test_each_image_has_a_trace_of_its_own(
    server: CloudServer, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(server, bundle, tmp_path, "--json", "--num-images", "2")
    images = printed(capsys.readouterr().out)
    assert len({image["trace_id"] for image in images}) == 2
