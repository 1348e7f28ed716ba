"""The compose demo without an engine: its files are parsed, and its very commands run as processes on this machine."""

import copy
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import ssl
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from deploy.run_demo import BIN, ENVIRONMENT, ROOT
from tests.support.patience import HANG_S
from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

PROMPT = "a fox to the left of a donut on a yellow background"


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


COMPOSE = load("docker-compose.yml")
GPU = load("deploy/docker-compose.gpu.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
OTHERS = [name for name in SERVICES if name not in OURS]
CLOUDS = [name for name in OURS if "cloud" in name]
SECRETS = "./deploy/secrets"


def filled_in(text: str) -> str:
    """Returns a text with the defaults of its variables."""
    return re.sub(r"\$\{\w+(?::-([^}]*))?\}", lambda match: match[1] or "", text)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Returns the instructions of a Dockerfile and what they say."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def mounts(service: str) -> dict[str, str]:
    """Returns for each path in a container what it is on this machine."""
    pairs = [filled_in(text).split(":")[:2] for text in SERVICES[service]["volumes"]]
    return {inside: outside for outside, inside in pairs}


def test_compose_understands_the_file() -> None:
    """Keys, values and what they refer to, by a parser of the specification; with and without what it must refuse."""
    from compose_spec.compose_spec import PyCompose

    def read(document: dict[str, Any]) -> None:
        PyCompose.from_yaml(yaml.safe_dump(json.loads(filled_in(json.dumps(document))))).validate()

    read(COMPOSE)
    for service in SERVICES.values():
        for needed in service.get("depends_on", {}):
            assert set(SERVICES[needed].get("profiles", [])) <= set(service.get("profiles", [])), needed
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["cloud"]["healthcheck"]["intervall"] = "5s"
    with pytest.raises(ValueError, match="intervall"):
        read(wrong)


def test_the_demo_is_what_runs_without_a_profile() -> None:
    """The others wait to be asked for."""
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}

    assert profiles == {
        "cloud": [], "gateway": [], "cloud-2": ["two-clouds"], "cloud-tls": ["tls"], "gateway-tls": ["tls"],
        "prometheus": ["observability"], "grafana": ["observability"],
        "replica": ["replicas"], "replica-2": ["replicas"], "postgres": ["replicas"],
    }  # fmt: skip


def test_the_second_cloud_answers_to_the_name_of_the_first() -> None:
    """So the gateway's command is the same for one and for two."""
    assert SERVICES["cloud-2"]["networks"]["default"]["aliases"] == ["cloud"]
    assert SERVICES["cloud-2"]["command"] == SERVICES["cloud"]["command"]


def test_images_of_others_are_pinned() -> None:
    """A version each, so that an update is a decision."""
    assert sorted(OTHERS) == ["grafana", "postgres", "prometheus"]
    for name in OTHERS:
        assert re.fullmatch(r"([a-z]+/)?[a-z]+:v?\d+\.\d+(\.\d+)?", SERVICES[name]["image"])


@pytest.mark.parametrize("service", OURS)
def test_files_that_the_compose_file_names_are_there(service: str) -> None:
    """Dockerfiles, what they copy, and every folder that is mounted; nothing that is copied is ignored."""
    build = SERVICES[service]["build"]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, words in instructions(build["dockerfile"]):
        if name == "COPY" and not words.startswith("--from"):
            *sources, _ = words.split()
            assert set(sources) <= allowed
            assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_is_there(service: str) -> None:
    """Files and folders of this repository, secrets that a script makes, and volumes that are declared."""
    for outside in mounts(service).values():
        if outside.startswith("."):
            assert (ROOT / outside).exists() or outside.startswith(SECRETS)
        else:
            assert outside in COMPOSE["volumes"]


@pytest.mark.parametrize("service", OURS)
def test_images_are_slim_and_nobody_is_root(service: str) -> None:
    """The last stage is a slim one with a user of its own, and the container may not do more than it needs."""
    steps = instructions(SERVICES[service]["build"]["dockerfile"])
    last = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    users = [words for name, words in last if name == "USER"]

    assert last[0][1].endswith("-slim")
    assert users == ["hybridsd"]
    assert any(f"useradd --uid 10001 --create-home {users[0]}" in words for name, words in last if name == "RUN")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_bounded(service: str) -> None:
    """Its image has a name, it may do little, its memory and processes have limits, its log does not fill the disk."""
    found = SERVICES[service]

    if service in OURS:
        assert filled_in(found["image"]) == f"hybridsd-{'cloud' if service in CLOUDS else 'edge'}:latest"
    assert found["read_only"]
    assert found["cap_drop"] == ["ALL"]
    assert found["healthcheck"]["test"][0] == "CMD"
    assert filled_in(found["mem_limit"]).endswith("g")
    assert found["pids_limit"] > 0
    assert {"max-size", "max-file"} <= set(found["logging"]["options"])


@pytest.mark.parametrize("service", OURS)
def test_sources_come_after_what_they_need(service: str, tmp_path: Path) -> None:
    """What is installed before the sources are copied is all that the package needs: a change of them costs seconds."""
    steps = instructions(SERVICES[service]["build"]["dockerfile"])
    extras = ["cloud"] if service in CLOUDS else ["edge", "postgres", "fsspec"]
    needed = f"python requirements.py {' '.join(extras)} > needed.txt && pip install -c constraints.txt -r needed.txt"
    printed = subprocess.run(
        [BIN / "python", "deploy/requirements.py", *extras], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = {
        requirement.name
        for requirement in map(Requirement, importlib.metadata.requires("hybridsd") or [])
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    }

    assert {Requirement(line).name for line in printed} == wanted
    first_source = min(index for index, (_, words) in enumerate(steps) if words.startswith("protos/hybridsd"))
    assert ("RUN", needed) in steps[:first_source]


@pytest.mark.parametrize("service", SERVICES)
def test_only_services_with_tls_and_tokens_are_published_beyond_this_machine(service: str) -> None:
    """The others' ports are this machine's, and each is one that something listens on."""
    command = SERVICES[service].get("command", [])
    for port in map(filled_in, SERVICES[service].get("ports", [])):
        address, _, inside = port.rpartition(":")[0].rpartition(":")[0], *port.split(":")[-2:]
        if service in OURS:
            assert command[command.index("--port") + 1] == inside
        if address != "127.0.0.1":
            assert {"--tls-cert", "--tls-key"} <= set(command)
            assert {"--token-file", "--client-tokens"} & set(command)
            assert not {"--insecure", "--open"} & set(command)


def test_gateways_ask_their_clouds() -> None:
    """By the name and port of the service; what Prometheus scrapes is exposed."""
    for gateway, cloud in (("gateway", "cloud"), ("gateway-tls", "cloud-tls"), ("replica", "cloud")):
        command = SERVICES[gateway]["command"]
        assert command[command.index("--server") + 1] == f"{cloud}:{SERVICES[cloud]['expose'][0]}"
        command = SERVICES[cloud]["command"]
        assert command[command.index("--metrics-port") + 1] == SERVICES[cloud]["expose"][1]


def test_the_gpu_file_changes_the_cloud_alone() -> None:
    """It names a service that there is, asks for a GPU, and leaves its command to the other file."""
    (name,) = GPU["services"]
    (device,) = GPU["services"][name]["deploy"]["resources"]["reservations"]["devices"]

    assert "command" not in GPU["services"][name]
    assert GPU["services"][name]["environment"] == {"HYBRIDSD_CLOUD_DEVICE": "cuda"}
    assert "--device" not in SERVICES[name]["command"]  # which would win
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_edge_image_has_no_torch() -> None:
    """Nothing that the edge needs, directly or not, is torch; the Dockerfile installs that and no more."""
    (installed,) = [words for name, words in instructions("deploy/edge.Dockerfile") if words.startswith("pip install")]
    seen: set[tuple[str, str]] = set()
    left = [("hybridsd", "edge"), ("hybridsd", "postgres"), ("hybridsd", "fsspec")]
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(requirement.name.lower(), each) for each in requirement.extras or {""}]

    names = {name for name, _ in seen}
    assert shlex.split(installed)[-1] == ".[edge,postgres,fsspec]"
    assert {"onnxruntime", "fastapi", "grpcio"} <= names
    assert not {"torch", "diffusers", "transformers"} & names


def command_of(service: str, changed: dict[str, str], *more: str) -> list[str]:
    """Returns the command of a service as one of this machine: paths, hosts and ports replaced."""
    (entry,) = [json.loads(w) for n, w in instructions(SERVICES[service]["build"]["dockerfile"]) if n == "ENTRYPOINT"]
    words = [*entry, *SERVICES[service]["command"], *more]
    folders = {path: str((ROOT / outside).resolve()) for path, outside in mounts(service).items() if outside[0] in "./"}
    places = {**folders, **changed}

    def here(word: str) -> str:
        name, equals, path = word.rpartition("=")
        for old in sorted(places, key=len, reverse=True):
            if path == old or path.startswith(f"{old}/"):
                return f"{name}{equals}{places[old]}{path.removeprefix(old)}"
        return word

    result = [here(word) for word in words]
    return [str(BIN / result[0]), *result[1:]]


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """Returns the port that a process writes to a file."""
    give_up_at = time.monotonic() + 120
    while not (path.exists() and path.read_text().strip()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up_at, log.read_text()
        time.sleep(0.05)
    return path.read_text().strip()


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env={**ENVIRONMENT, **environment})


@contextmanager
def running(
    cloud_service: str, gateway_service: str, folder: Path, secrets: Path | None = None, **more: str
) -> Iterator[tuple[str, str]]:
    """A cloud and a gateway as processes: the addresses of both, host:port."""
    changed = {"0.0.0.0": "127.0.0.1", "50051": "0", "8080": "0", "8443": "0", "9464": "0"}
    changed |= {"/data/gateway": str(folder / "data"), "/data/images": str(folder / "images"), **more}
    processes = []

    def run(service: str, part: str) -> str:
        own = {} if secrets is None else {"/run/secrets": str(secrets / part)}
        port_file, log = folder / f"{part}.port", folder / f"{part}.log"
        command = command_of(service, {**changed, **own}, "--port-file", str(port_file))
        processes.append(start(command, log, HYBRIDSD_EDGE_CACHE=str(folder / "cache")))
        return f"127.0.0.1:{wait_for(port_file, processes[-1], log)}"

    try:
        address = run(cloud_service, "cloud")
        changed[f"{cloud_service}:50051"] = address
        yield address, run(gateway_service, "gateway")
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=HANG_S)


def healthy(service: str, changed: dict[str, str]) -> bool:
    """Runs the health check of a service."""
    kind, *words = SERVICES[service]["healthcheck"]["test"]
    assert kind == "CMD"
    command = [str(BIN / words[0]), *(changed.get(word, word) for word in words[1:])]
    return subprocess.run(command, capture_output=True, check=False, timeout=HANG_S, env=os.environ).returncode == 0


def draw(client: httpx.Client) -> tuple[list[str], dict[str, Any], bytes]:
    """Draws a picture in both places; returns the names of its events, the job and the file."""
    job = client.post("/v1/jobs", json={"prompt": PROMPT, "seed": 7, "hybrid": {"split": "2,2"}}).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        names = [line.removeprefix("event: ") for line in events.iter_lines() if line.startswith("event: ")]
    done = client.get(f"/v1/jobs/{job['id']}").json()
    return names, done, client.get(done["images"][0]["url"]).content


def test_the_commands_of_the_compose_file_make_a_picture(tmp_path: Path) -> None:
    """Both health checks pass, the page is there, and a job is drawn in both places."""
    with running("cloud", "gateway", tmp_path) as (cloud, gateway):
        with httpx.Client(base_url=f"http://{gateway}", timeout=HANG_S, trust_env=False) as client:
            page = client.get("/")
            names, done, picture = draw(client)

        assert healthy("cloud", {"127.0.0.1:50051": cloud})
        assert healthy("gateway", {"http://127.0.0.1:8080": f"http://{gateway}"})
        assert not healthy("gateway", {"http://127.0.0.1:8080": "http://127.0.0.1:9"})
        assert not healthy("cloud", {"127.0.0.1:50051": "127.0.0.1:9"})
    assert "text/html" in page.headers["content-type"]
    assert names[-1] == "completed"
    assert (done["images"][0]["mode"], done["images"][0]["actual_cloud_steps"]) == ("hybrid", 2)
    assert picture.startswith(b"\x89PNG")


def test_the_command_of_a_replica_makes_a_picture(tmp_path: Path, postgres: Postgres) -> None:
    """With a Postgres; its database and its images are where the command says."""
    words = SERVICES["replica"]["command"]
    database = words[words.index("--database") + 1]
    with (
        running("cloud", "replica", tmp_path, **{database: postgres.fresh()}) as (_, gateway),
        httpx.Client(base_url=f"http://{gateway}", timeout=HANG_S, trust_env=False) as client,
    ):
        names, _, picture = draw(client)

    assert names[-1] == "completed"
    assert picture == next((tmp_path / "images").glob("images/*/0.png")).read_bytes()
    assert SERVICES["replica-2"]["command"] == words
    assert database == f"postgresql://{SERVICES['postgres']['environment']['POSTGRES_USER']}@postgres/hybridsd"


def test_secrets_that_are_lost_are_made_again_for_all_who_share_them(tmp_path: Path) -> None:
    """A token that Prometheus has lost is another one at both, and nobody else's changes."""

    def make() -> dict[str, dict[str, str]]:
        command = [str(BIN / "python"), "deploy/make_secrets.py", "--folder", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=HANG_S)
        files = (tmp_path / "cloud/tokens.toml", tmp_path / "gateway/client-tokens.toml")
        return {file.name: {name: table["sha256"] for name, table in read_toml(file).items()} for file in files}

    before = make()
    (tmp_path / "prometheus/token").unlink()
    after = make()
    token = (tmp_path / "prometheus/token").read_text(encoding="utf-8").strip()

    digest = hashlib.sha256(token.encode()).hexdigest()
    assert {tables["prometheus"] for tables in after.values()} == {digest}
    for name, tables in before.items():
        assert tables["prometheus"] != digest
        assert {**tables, "prometheus": digest} == after[name]


def read_toml(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))


def test_the_profile_with_tls_draws_for_who_has_a_token(tmp_path: Path) -> None:
    """With the secrets that the script makes: HTTPS in front, TLS and a token between, health checks that pass."""
    secrets = tmp_path / "secrets"
    make = [str(BIN / "python"), "deploy/make_secrets.py", "--folder", str(secrets)]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True, timeout=HANG_S).stdout
    (token,) = re.findall(r"shown only now: (\S+)", said)
    files = {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()}
    again = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True, timeout=HANG_S).stdout
    assert token not in again
    assert {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()} == files
    assert (secrets.stat().st_mode & 0o777, token.encode() in b"".join(files.values())) == (0o700, False)
    scraping = (ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8")
    for wanted in re.findall(r"/run/secrets/([\w.]+)", scraping):
        assert (secrets / "prometheus" / wanted).is_file()

    trust = ssl.create_default_context(cafile=str(secrets / "gateway/tls.pem"))
    with running("cloud-tls", "gateway-tls", tmp_path, secrets) as (cloud, gateway):
        with httpx.Client(base_url=f"https://{gateway}", timeout=HANG_S, trust_env=False, verify=trust) as client:
            stranger = client.get("/v1/jobs")
            client.headers["authorization"] = f"Bearer {token}"
            _, done, _ = draw(client)
        assert healthy("cloud-tls", {"127.0.0.1:50051": cloud})
        assert healthy("gateway-tls", {"https://127.0.0.1:8443": f"https://{gateway}"})
        assert not healthy("cloud", {"127.0.0.1:50051": cloud})  # which speaks plain text

    assert stranger.status_code == 401
    assert (done["images"][0]["mode"], done["images"][0]["actual_cloud_steps"]) == ("hybrid", 2)
