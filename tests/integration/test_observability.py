"""Whoever watches a cloud and a gateway: dashboards, alert rules and the document name what really comes out, and the
log is as its schema says, without a prompt."""

import asyncio
import io
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import jsonschema
import pytest
import structlog
import yaml

from cloud_server.models.load import Model
from cloud_server.rpc.server import CloudServer
from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import logs
from edge_client.web.app import create_app
from edge_client.web.settings import Settings
from hybridsd.errors import Reason
from hybridsd.tokens import Tokens, add_token
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.integration.conftest import serving
from tests.integration.web.conftest import listening
from tests.support.exposition import Exposition
from tests.support.patience import HANG_S
from tests.support.promql import RATES, Expression, Selector, parse

ROOT = Path(__file__).parents[2]
PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
DOCUMENT, SCHEMA = ROOT / "docs" / "observability.md", ROOT / "docs" / "log.schema.json"
MARKER = "zanzibar-heliotrope"
"""A word of every prompt, which nothing may repeat."""
OF_PROMETHEUS = {"job", "instance"}
"""Labels that every series has, once it is scraped."""


@dataclass(frozen=True)
class Day:
    """What a cloud and a gateway said of a day on which all kinds of things happened."""

    cloud: Exposition
    gateway: Exposition
    lines: list[dict[str, Any]]
    text: str
    """All of the log."""

    @property
    def kinds(self) -> dict[str, str]:
        return self.cloud.kinds | self.gateway.kinds | {"up": "gauge"}

    @property
    def labels(self) -> dict[str, set[str]]:
        return self.cloud.labels | self.gateway.labels | {"up": set()}


def ask(client: httpx.Client, **changes: Any) -> str:
    """Draws an image; returns how its job ended."""
    body = {"prompt": f"a {MARKER}", "negative_prompt": f"no {MARKER}", "num_inference_steps": 4,
            "hybrid": {"cloud_steps": 2}, "previews": 1, **changes}  # fmt: skip
    job = client.post("/v1/jobs", json=body).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        for _ in events.iter_lines():
            pass
    return str(client.get(f"/v1/jobs/{job['id']}").json()["state"])


def call_cloud(server: CloudServer, request: pb.DenoiseRequest, **metadata: str) -> grpc.StatusCode:
    """Calls the cloud itself; returns the status."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
        try:
            list(stub.Denoise(request, metadata=tuple(metadata.items()), timeout=HANG_S))
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def day(model: Model, bundle: Bundle, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Day:
    """An image, refused requests, a lost cloud; expiring tokens and a certificate; all is logged, at any level."""
    folder = tmp_path_factory.mktemp("day")
    never, soon = frozenset({"generate", "metrics"}), datetime(2037, 1, 1, tzinfo=UTC)
    secret = add_token(folder / "tokens", "watcher", scopes=never, expires=soon)
    bearer = {"authorization": f"Bearer {secret}"}
    tokens, stream = Tokens(folder / "tokens"), io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("json", level=logging.DEBUG, stream=stream)
    try:
        with serving({"tiny": model}, metrics_port=0, tokens=tokens) as server:
            server.metrics.watch_certificate(lambda: soon)
            target = f"127.0.0.1:{server.port}"
            with Cloud(target, token=secret, cache=Cache(folder / "cache"), idle_timeout_s=HANG_S) as cloud:
                app = create_app(Settings(data_dir=folder / "data", tokens=tokens), bundle, models, cloud)
                app.state.metrics.watch_certificate(lambda: soon)
                options: dict[str, Any] = {"timeout": HANG_S, "trust_env": False}
                with listening(app) as url, httpx.Client(base_url=url, headers=bearer, **options) as client:
                    assert ask(client) == "completed"
                    assert ask(client, hybrid={"mode": "edge"}) == "completed"
                    assert client.post("/v1/jobs", json={"prompt": MARKER, "width": 9}).status_code == 422
                    assert client.get(f"/{MARKER}?q={MARKER}").status_code == 404
                    assert client.get("/v1/jobs", headers={"authorization": "Bearer x"}).status_code == 401
                    text = pb.TextConditioning(prompt=MARKER)
                    assert call_cloud(server, pb.DenoiseRequest(text=text), **bearer) is not grpc.StatusCode.OK
                    asked = pb.DenoiseRequest(text=text, scheduler=pb.SchedulerSpec(name=MARKER))
                    assert (
                        call_cloud(server, asked, **bearer, **{"x-hybridsd-user": "somebody"}) is not grpc.StatusCode.OK
                    )
                    at = f"http://127.0.0.1:{server.metrics_port}/metrics"
                    seen_cloud = httpx.get(at, headers=bearer, **options).text
                    loop = server._watchdog.get_loop()  # type: ignore[union-attr]
                    asyncio.run_coroutine_threadsafe(server.stop(0.0), loop).result(HANG_S)
                    assert ask(client) == "completed"  # by the edge, which takes over
                    seen_gateway = client.get("/metrics").text
    finally:
        root.handlers[:], root.level = handlers, level
        structlog.reset_defaults()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return Day(Exposition(seen_cloud), Exposition(seen_gateway), lines, stream.getvalue())


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def dashboards() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(GRAFANA.glob("dashboards/*.json"))]


def expressions() -> list[tuple[str, str]]:
    """Returns every expression of rules and dashboards, with where it stands."""
    found = [(rule["alert"], rule["expr"]) for rule in rules()]
    for path, board in dashboards():
        for panel in board["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel.get("targets", ())]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
                assert asked is not None
                assert asked[2] in OF_PROMETHEUS
                found.append((f"{path.stem}: {variable['name']}", asked[1]))
    return found


def faults_of(expression: Expression, day: Day) -> Iterator[str]:
    """Yields what in an expression would never have a value, or a wrong one."""
    known = set(Reason.__members__)
    for selector in expression.selectors:
        if selector.name not in day.kinds:
            yield f"there is no metric {selector.name}"
            continue
        yield from _faults_of_use(selector, day)
        for label, operator, wanted in selector.matchers:
            if label in OF_PROMETHEUS:
                continue
            if label not in day.labels[selector.name]:
                yield f"{selector.name} has no label {label}"
            seen = {
                value for (name, labels), _ in {**day.cloud.values, **day.gateway.values}.items()
                for key, value in labels if name == selector.name and key == label
            } | (known if label == "reason" else set())  # fmt: skip
            for value in wanted.split("|") if operator == "=~" else [wanted]:
                if value not in seen:
                    yield f"{label} of {selector.name} is never {value!r}, but {', '.join(sorted(seen))}"
    available = set().union(*(day.labels.get(each.name, set()) for each in expression.selectors)) | OF_PROMETHEUS
    for _, grouping in expression.groupings:
        if unknown := grouping - available:
            yield f"no metric here has {', '.join(sorted(unknown))}"


def _faults_of_use(selector: Selector, day: Day) -> Iterator[str]:
    around = selector.functions[-1] if selector.functions else ""
    is_counter = day.kinds[selector.name] in ("counter", "histogram")
    if is_counter and around not in RATES:
        yield f"{selector.name} is a counter, and is not in rate()"
    if not is_counter and around in RATES:
        yield f"{selector.name} is no counter, but is in {around}()"
    if selector.has_range != (around in RATES):
        yield f"{selector.name} needs a range in rate(), and only there"
    is_quantile = "histogram_quantile" in selector.functions
    if is_quantile != selector.name.endswith("_bucket"):
        yield f"{selector.name} in histogram_quantile() must be buckets, and only there"
    if is_quantile and "le" not in day.labels[selector.name]:
        yield f"{selector.name} has no le"


def quantile_faults(expression: Expression) -> Iterator[str]:
    """Yields quantiles whose sums lose the buckets' `le`."""
    for functions, grouping in expression.groupings:
        if "histogram_quantile" in functions and "le" not in grouping:
            yield "a sum in histogram_quantile() must be by le"


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_expression_asks_for_what_comes_out(where: str, expression: str, day: Day) -> None:
    """Metrics, labels and their values are there; rates are of counters, quantiles of buckets by `le`."""
    parsed = parse(expression)
    assert parsed.selectors
    assert [*faults_of(parsed, day), *quantile_faults(parsed)] == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("hybridsd_cloud_queue_lenght", "there is no metric"),
        ("rate(hybridsd_cloud_queue_length[5m])", "is no counter"),
        ("hybridsd_cloud_jobs_total", "is not in rate()"),
        ("rate(hybridsd_cloud_jobs_total)", "needs a range"),
        ('rate(hybridsd_cloud_jobs_total{outcome="done"}[5m])', "is never 'done'"),
        ('rate(hybridsd_cloud_jobs_total{result="completed"}[5m])', "has no label result"),
        ("sum by (modle) (rate(hybridsd_cloud_steps_total[5m]))", "has modle"),
        ("histogram_quantile(0.9, rate(hybridsd_cloud_step_seconds_sum[5m]))", "must be buckets"),
        ("histogram_quantile(0.9, sum by (model) (rate(hybridsd_cloud_step_seconds_bucket[5m])))", "must be by le"),
    ],
)
def test_wrong_expressions_are_found(expression: str, fault: str, day: Day) -> None:
    """The check itself can see what is wrong."""
    parsed = parse(expression)
    assert any(fault in found for found in [*faults_of(parsed, day), *quantile_faults(parsed)])


def test_every_alert_says_what_to_do() -> None:
    """A severity, a summary, and the paragraph of the runbook under its name."""
    assert len(rules()) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{rule['alert'].lower()}"
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def test_alerts_ask_for_labels_that_their_expressions_keep(day: Day) -> None:
    """`{{ $labels.target }}` needs a label that no sum has dropped."""
    for rule in rules():
        parsed = parse(rule["expr"])
        kept = set.intersection(*(grouping for _, grouping in parsed.groupings)) if parsed.groupings else (
            set.intersection(*(day.labels[each.name] for each in parsed.selectors)) | OF_PROMETHEUS
        )  # fmt: skip
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= kept, rule["alert"]


def test_dashboards_can_be_provisioned() -> None:
    """Ids are each their own, panels do not overlap, and every panel of a row has something to show."""
    boards = dashboards()
    assert {path.stem for path, _ in boards} == {"cloud", "gateway"}
    assert len({board["uid"] for _, board in boards}) == 2
    for _, board in boards:
        taken: set[tuple[int, int]] = set()
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken, panel["title"]
            assert place["x"] + place["w"] <= 24
            taken |= cells
            assert panel["type"] == "row" or panel["targets"]
            letters = [target["refId"] for target in panel.get("targets", ())]
            assert len(set(letters)) == len(letters)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_prometheus_takes_its_files(tmp_path: Path) -> None:
    """Rules and configuration; and expressions of dashboards, once Grafana has filled in its variables."""
    filled = [
        expression.replace("$__rate_interval", "5m").replace("$instance", ".*") for _, expression in expressions()
    ]
    recorded = [{"record": f"seen:{index}", "expr": expression} for index, expression in enumerate(filled)]
    path = tmp_path / "dashboards.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": recorded}]}), encoding="utf-8")
    for command in (["rules", "alerts.yml"], ["rules", str(path)], ["config", "--syntax-only", "prometheus.yml"]):
        done = subprocess.run(["promtool", "check", *command], cwd=PROMETHEUS, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def documented(day: Day) -> list[str]:
    """Returns the rows of the document's tables."""
    from prometheus_client.parser import text_string_to_metric_families

    rows = []
    for exposition in (day.cloud, day.gateway):
        for family in sorted(text_string_to_metric_families(exposition.text), key=lambda family: family.name):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            shown = ", ".join(f"`{label}`" for label in labels)
            rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return rows


def test_the_document_lists_every_metric(day: Day) -> None:
    """With type, labels and meaning, and nothing else."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if re.match(r"\| `(hybridsd|grpc)_", line)]
    assert found == documented(day), "\n".join(documented(day))


def test_every_series_is_of_the_day(day: Day) -> None:
    """All metrics with labels had a value on it, so that the checks above know their labels."""
    for exposition in (day.cloud, day.gateway):
        silent = {name for name in exposition.kinds if not any(each == name for each, _ in exposition.values)}
        assert silent == set()


def test_names_are_as_prometheus_advises(day: Day) -> None:
    """A prefix for each program, base units at the end, total for what only grows."""
    for name, kind in (day.cloud.kinds | day.gateway.kinds).items():
        assert name.startswith(("hybridsd_cloud_", "hybridsd_edge_", "grpc_server_call_"))
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|mib|percent)(_|$)", name)


def test_each_line_of_the_log_is_as_the_schema_says(day: Day) -> None:
    """Of every event; and a request is one line, with the same id as what else is said about it."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for line in day.lines:
        assert [error.message for error in validator.iter_errors(line)] == [], line
    events = [line["event"] for line in day.lines]
    assert {"call", "request", "job_ended"} <= set(events)
    calls = [line for line in day.lines if line["event"] == "call" and line["method"] == "Denoise"]
    assert [line["code"] for line in calls].count("INVALID_ARGUMENT") == 2
    ended = [line for line in day.lines if line["event"] == "job_ended"]
    assert len(ended) == 3
    made = [line for line in day.lines if line["event"] == "request" and line["method"] == "POST"]
    assert [(line["route"], line["status"]) for line in made] == [("/v1/jobs", 202)] * 2 + [("/v1/jobs", 422)] + [
        ("/v1/jobs", 202)
    ]
    assert {line.get("job") for line in made} == {line["job"] for line in ended} | {None}
    assert {line.get("token") for line in made} == {"watcher"}
    assert len({line["request_id"] for line in day.lines if line["event"] == "request"}) == events.count("request")
    unknown = [line for line in day.lines if line["event"] == "request" and line["status"] in (401, 404)]
    assert {(line["route"], line["reason"]) for line in unknown} == {
        ("/v1/jobs", "UNAUTHENTICATED"), ("other", "NOT_FOUND"),
    }  # fmt: skip


def test_a_line_that_the_schema_does_not_know_is_found() -> None:
    """A field more on the line of a call or a request is refused: the schema says all of them."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    line = {
        "event": "request", "level": "info", "timestamp": "2026-11-28T11:00:00.123456Z", "logger": "x",
        "request_id": "a", "method": "GET", "route": "/", "status": 200, "is_whole": True, "sent_bytes": 1,
        "elapsed_ms": 0.1,
    }  # fmt: skip
    assert validator.is_valid(line)
    for wrong in ({"prompt": "a fox"}, {"status": "200"}, {"trace_id": "0x1"}, {"elapsed_ms": -1}):
        assert not validator.is_valid({**line, **wrong})


def test_no_prompt_is_in_logs_or_metrics(day: Day) -> None:
    """At no level, in no label, of neither end, also where a request was wrong."""
    assert any(line["level"] == "debug" for line in day.lines)
    assert MARKER not in day.text
    assert MARKER not in day.cloud.text + day.gateway.text
    assert "hsd_" not in day.text + day.cloud.text + day.gateway.text, "nor a token"
