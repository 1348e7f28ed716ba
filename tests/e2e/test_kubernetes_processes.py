"""What deploy/kubernetes runs, as processes: commands, variables, secrets and probes as they are rendered."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import make_url

from deploy.run_demo import PROMPT
from hybridsd.certificates import own_certificate
from hybridsd.tokens import add_token, remove_token
from tests.support.exposition import Exposition
from tests.support.kubernetes_secrets import made_secrets
from tests.support.manifests import Workload, adapted, find, render, workloads
from tests.support.patience import HANG_S
from tests.support.pods import Cluster, Pod, trust
from tests.support.postgres import Postgres
from tests.support.promql import parse

pytestmark = pytest.mark.slow


def workload(cluster: Cluster, name: str) -> Workload:
    (found,) = (each for each in workloads(cluster.documents) if each.name == name)
    return found


@contextmanager
def running(folder: Path, overlay: str, addresses: tuple[str, ...], **secrets: Any) -> Iterator[Cluster]:
    """Clouds at these addresses and a gateway of an overlay, all ready."""
    with ExitStack() as stack:
        cluster = Cluster(folder, render(overlay), **secrets)
        stack.callback(cluster.end)
        clouds = [cluster.start(workload(cluster, "hybridsd-cloud"), address) for address in addresses]
        assert not clouds[0].probe("readinessProbe")  # it loads, or does not even listen
        for cloud in clouds:
            cloud.wait_until_ready()
        gateway = cluster.start(workload(cluster, "hybridsd-gateway"))
        gateway.wait_until_ready()
        yield cluster


def draw(client: httpx.Client, seed: int = 7) -> dict[str, Any]:
    """Draws an image in both places; returns the job."""
    asked = client.post("/v1/jobs", json={"prompt": PROMPT, "seed": seed, "hybrid": {"split": "2,2"}})
    assert asked.status_code == 202, asked.text
    job = asked.json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        for _ in events.iter_lines():
            pass
    done: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").json()
    assert done["state"] == "completed", done
    return done


def cloud_steps(job: dict[str, Any]) -> int:
    steps: int = job["images"][0]["actual_cloud_steps"]
    return steps


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < give_up_at, what
        time.sleep(0.3)


def test_the_demo_draws_on_one_node(tmp_path: Path) -> None:
    """In plain text, through the address that `kubectl port-forward` gives; the adapter's series are there."""
    with running(tmp_path, "overlays/demo", ("127.0.0.1",), secrets={}) as cluster:
        cloud, gateway = cluster.pods
        with httpx.Client(base_url=gateway.url("web"), timeout=HANG_S, trust_env=False) as client:
            assert "text/html" in client.get("/").headers["content-type"]
            assert cloud_steps(draw(client)) == 2
            scraped = client.get(cloud.url("metrics") + "/metrics").text
        cloud.terminate()
        assert cloud.process.wait(timeout=HANG_S) == 0
        assert not any(cloud.probe(name) for name in ("startupProbe", "readinessProbe", "livenessProbe"))
        assert gateway.probe("livenessProbe")
        assert gateway.probe("readinessProbe")  # it draws alone

    seen = Exposition(scraped)
    asked = [
        selector for rule in adapted().values() for text in (rule["seriesQuery"], filled(rule))
        for selector in parse(text).selectors
    ]  # fmt: skip
    assert {selector.name for selector in asked} == {"hybridsd_cloud_queued_steps"}
    for selector in asked:
        assert seen.kinds[selector.name] == "gauge"
        assert seen.labels[selector.name] == set()  # so that a sum by pod is that pod's


def filled(rule: dict[str, Any]) -> str:
    """Returns the query of a rule of the adapter for one pod."""
    text: str = rule["metricsQuery"]
    series = rule["seriesQuery"].partition("{")[0]
    for name, value in (("Series", series), ("LabelMatchers", 'pod="a"'), ("GroupBy", "pod")):
        text = text.replace(f"<<.{name}>>", value)
    return text


def scrape(cluster: Cluster, pod: Pod, name: str) -> httpx.Response:
    """Asks as Prometheus would that has this ServiceMonitor."""
    spec = find(cluster.documents, "ServiceMonitor", name)["spec"]
    (endpoint,) = spec["endpoints"]
    (service,) = (
        each for each in cluster.documents
        if each["kind"] == "Service"
        and spec["selector"]["matchLabels"].items() <= each["metadata"].get("labels", {}).items()
    )  # fmt: skip
    (port,) = (each["targetPort"] for each in service["spec"]["ports"] if each["name"] == endpoint["port"])
    authority, token = endpoint["tlsConfig"]["ca"]["secret"], endpoint["authorization"]["credentials"]
    verify = trust([cluster.secrets[authority["name"]][authority["key"]]])
    bearer = cluster.secrets[token["name"]][token["key"]].decode().strip()
    with httpx.Client(verify=verify, trust_env=False, timeout=HANG_S) as client:
        return client.get(
            pod.url(port, endpoint["scheme"]) + endpoint["path"],
            headers={"authorization": f"{endpoint['authorization']['type']} {bearer}"},
            extensions={"sni_hostname": endpoint["tlsConfig"]["serverName"]},
        )


def test_production_draws_rotates_and_drains(tmp_path: Path) -> None:
    """Two clouds under one name and a gateway, with TLS and tokens from secrets.

    They draw for who has a token, are scraped, take rotated tokens and certificates without a restart, and a cloud that
    ends leaves its work to the other.
    """
    made, token = made_secrets(tmp_path / "made")
    (tmp_path / "cluster").mkdir()
    with running(tmp_path / "cluster", "overlays/production", ("127.0.0.1", "127.0.0.2"), secrets=made) as cluster:
        first, second, gateway = cluster.pods
        verify = trust([made["hybridsd-metrics"]["gateway.pem"]])
        url = gateway.url("web", "https")
        with httpx.Client(base_url=url, timeout=HANG_S, trust_env=False, verify=verify) as client:
            assert client.get("/v1/jobs").status_code == 401
            client.headers["authorization"] = f"Bearer {token}"
            assert cloud_steps(draw(client)) == 2

            for pod, name in ((first, "hybridsd-cloud"), (second, "hybridsd-cloud"), (gateway, "hybridsd-gateway")):
                answer = scrape(cluster, pod, name)
                assert answer.status_code == 200, answer.text
                assert "hybridsd_" in answer.text
                with httpx.Client(verify=False, trust_env=False) as stranger:
                    assert stranger.get(str(answer.request.url)).status_code in (401, 403)

            token, authority = rotate(cluster, client)

        verify = trust([authority])
        with httpx.Client(base_url=url, timeout=HANG_S, trust_env=False, verify=verify) as client:
            client.headers["authorization"] = f"Bearer {token}"
            assert cloud_steps(draw(client, seed=8)) == 2

            first.terminate()
            wait_for(lambda: not first.probe("readinessProbe"), "the first cloud stays ready")
            assert first.process.wait(timeout=first.workload.spec["terminationGracePeriodSeconds"] + HANG_S) == 0
            drawn = [draw(client, seed=seed) for seed in (9, 10)]
        assert [cloud_steps(job) for job in drawn] == [2, 2]
        assert second.process.poll() is None
        counted = Exposition(scrape(cluster, second, "hybridsd-cloud").text)
        assert counted.total("hybridsd_cloud_jobs_total", outcome="completed") >= 2


def rotate(cluster: Cluster, client: httpx.Client) -> tuple[str, bytes]:
    """Replaces every token and the gateway's certificate; waits until the old ones are refused.

    Returns:
        The new token of web clients, and the new certificate.
    """
    files, before = cluster.folder / "next", cluster.secrets
    files.mkdir()
    of_cloud, of_clients = files / "tokens.toml", files / "client-tokens.toml"
    of_cloud.write_bytes(before["hybridsd-cloud-tokens"]["tokens.toml"])
    between = add_token(of_cloud, "gateway-next", scopes=frozenset({"generate"}))
    token = add_token(of_clients, "second", scopes=frozenset({"generate"}))
    cluster.rotate("hybridsd-cloud-tokens", {"tokens.toml": of_cloud.read_bytes()})
    cluster.rotate(
        "hybridsd-gateway-tokens",
        {
            "token": between.encode(),
            "cloud.pem": before["hybridsd-gateway-tokens"]["cloud.pem"],
            "client-tokens.toml": of_clients.read_bytes(),
        },
    )
    wait_for(lambda: client.get("/v1/jobs").status_code == 401, "the old token of web clients stays good")
    client.headers["authorization"] = f"Bearer {token}"
    assert client.get("/v1/jobs").status_code == 200
    remove_token(of_cloud, "gateway")  # from here on only a gateway that has read its new token has a cloud
    cluster.rotate("hybridsd-cloud-tokens", {"tokens.toml": of_cloud.read_bytes()})

    gateway = cluster.pods[-1]
    pem = own_certificate(files / "tls", ["hybridsd-gateway", gateway.address]).path.read_bytes()
    cluster.rotate("hybridsd-gateway-tls", {"tls.crt": pem, "tls.key": pem})

    def is_renewed() -> bool:
        try:
            with httpx.Client(verify=trust([pem]), trust_env=False, timeout=HANG_S) as other:
                return other.get(gateway.url("web", "https") + "/healthz").status_code == 200
        except httpx.ConnectError:
            return False

    wait_for(is_renewed, "the gateway shows its old certificate")
    return token, pem


def test_gateways_share_jobs_and_images(tmp_path: Path, postgres: Postgres) -> None:
    """Two of the overlay `replicas`, with a Postgres that a mounted file names: what one draws, the other hands out."""
    made, token = made_secrets(tmp_path / "made")
    address = make_url(postgres.fresh()).query
    lines = ["[hybridsd]", f"host={address['host']}", "user=test", "dbname=postgres", f"options={address['options']}"]
    made["hybridsd-gateway-database"] = {"pg_service.conf": "\n".join(lines).encode()}
    (tmp_path / "cluster").mkdir()
    with running(tmp_path / "cluster", "overlays/replicas", ("127.0.0.1",), secrets=made) as cluster:
        first = cluster.pods[-1]
        second = cluster.start(workload(cluster, "hybridsd-gateway"))
        second.wait_until_ready()
        verify = trust([made["hybridsd-metrics"]["gateway.pem"]])
        headers = {"authorization": f"Bearer {token}"}
        options: dict[str, Any] = {"timeout": HANG_S, "trust_env": False, "verify": verify, "headers": headers}
        with httpx.Client(base_url=first.url("web", "https"), **options) as client:
            job = draw(client)
            url = job["images"][0]["url"]
            image = client.get(url).content
        with httpx.Client(base_url=second.url("web", "https"), **options) as other:
            assert other.get(f"/v1/jobs/{job['id']}").json()["state"] == "completed"
            assert other.get(url).content == image
        first.terminate()
        first.process.wait(timeout=HANG_S)
        with httpx.Client(base_url=second.url("web", "https"), **options) as other:
            assert other.get(url).content == image

    assert image.startswith(b"\x89PNG")


def test_a_wrong_option_ends_a_pod(tmp_path: Path) -> None:
    """So that a broken overlay is seen at once: the process says what is wrong, and no probe answers."""
    documents = render("overlays/demo")
    for each in documents:
        if each["kind"] == "ConfigMap" and "HYBRIDSD_CLOUD_MODEL" in each["data"]:
            each["data"]["HYBRIDSD_CLOUD_MODEL"] = "demo=/models/none"
    cluster = Cluster(tmp_path, documents, {})
    pod = cluster.start(workload(cluster, "hybridsd-cloud"))
    try:
        assert pod.process.wait(timeout=HANG_S) == 2
        assert not pod.probe("startupProbe")
        assert "none" in pod.log.read_text(encoding="utf-8")
    finally:
        cluster.end()
