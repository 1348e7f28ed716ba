"""deploy/kubernetes without a cluster: rendered, valid, within policies, and with every reference leading somewhere.

Each check is shown a broken copy, too. tests/e2e/test_kubernetes_processes.py runs what is rendered.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy.run_demo import BIN, ROOT
from edge_client.cloud.pool import MAX_SERVERS
from tests.support.kubernetes_secrets import made_secrets
from tests.support.manifests import (
    ENTRYPOINTS,
    KUBERNETES,
    Document,
    adapted,
    changed,
    faults,
    find,
    instructions,
    read,
    render,
    secret_faults,
    selects,
    workloads,
)
from tests.support.patience import HANG_S
from tests.support.promql import parse

pytestmark = pytest.mark.slow

OVERLAYS = ("overlays/demo", "overlays/production", "overlays/ray", "overlays/replicas")
FOLDERS = ("storage", *OVERLAYS)
VERSIONS = ("1.30", "1.37")
"""The oldest that the documents promise, and the newest that is known here."""
CHECKOV = BIN.parent / "checkov/bin/checkov"
PLAIN, FULL, RAY, MANY = OVERLAYS
OF_RAY = ROOT / "deploy/ray"
CLOUD = "spec/template/spec"
BOX = f"{CLOUD}/containers/0"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The secrets that the document's commands make, with their keys."""
    made, _ = made_secrets(tmp_path_factory.mktemp("secrets"))
    return {name: set(data) for name, data in made.items()}


def kept() -> list[Document]:
    return [*render("storage"), *read(KUBERNETES / "storage/images.yaml")]


# Schemas.


def wrong_fields(document: Document, version: str = VERSIONS[-1]) -> Iterator[str]:
    """Yields what in a document its schema does not know, or has another type of."""
    if document["apiVersion"] == "monitoring.coreos.com/v1":
        from cloudcoil.models.prometheus_operator import v1
        from pydantic import ValidationError

        try:
            known = getattr(v1, document["kind"]).model_validate(document)
        except ValidationError as error:
            yield str(error)
            return
        understood = known.model_dump(by_alias=True, exclude_unset=True, mode="json")
        yield from _lost(document, understood, "")
        return
    if document["kind"] == "RayService":
        yield from (error.message for error in jsonschema.Draft202012Validator(RAY_SERVICE).iter_errors(document))
        for pod in pods_of_ray(document):
            yield from wrong_fields(pod, version)
        return
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'/'.join(map(str, error.path))}: {error.message}"


def known(required: str, optional: str = "", **of: Any) -> dict[str, Any]:
    """Returns the schema of an object with these fields and no other."""
    names = [*required.split(), *optional.split()]
    return {
        "type": "object", "required": required.split(), "additionalProperties": False,
        "properties": {name: of.get(name, {}) for name in names},
    }  # fmt: skip


COUNT = {"type": "integer", "minimum": 0}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
RAY_SERVICE = known(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    spec=known(
        "serveConfigV2 rayClusterConfig",
        "excludeHeadPodFromServeSvc serveService upgradeStrategy rayClusterDeletionDelaySeconds suspend",
        serveConfigV2={"type": "string"},
        excludeHeadPodFromServeSvc={"type": "boolean"},
        rayClusterConfig=known(
            "headGroupSpec",
            "workerGroupSpecs enableInTreeAutoscaling autoscalerOptions rayVersion gcsFaultToleranceOptions",
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=known(
                "", "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version",
                idleTimeoutSeconds=COUNT,
            ),
            headGroupSpec=known(
                "template", "rayStartParams serviceType headService enableIngress resources labels",
                rayStartParams=PARAMETERS,
            ),
            workerGroupSpecs={"type": "array", "items": known(
                "groupName template", "replicas minReplicas maxReplicas rayStartParams numOfHosts idleTimeoutSeconds",
                replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=PARAMETERS,
            )},
        ),
    ),
)  # fmt: skip
"""As KubeRay's reference has it, as far as we use it: no package has its schema. Its pods have that of Kubernetes."""


def pods_of_ray(document: Document) -> list[Document]:
    """Returns the pods that a RayService asks for."""
    cluster = document["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        {
            "apiVersion": "v1", "kind": "Pod", "spec": group["template"]["spec"],
            "metadata": {**group["template"]["metadata"], "name": f"ray-{number}", "namespace": "hybridsd"},
        }
        for number, group in enumerate(groups)
    ]  # fmt: skip


def _lost(given: Any, understood: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(understood, dict) or key not in understood:
                yield f"{where}/{key} is unknown"
            else:
                yield from _lost(value, understood[key], f"{where}/{key}")
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from _lost(value, understood[index], f"{where}/{index}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_document_is_valid(folder: str, version: str) -> None:
    """By the schema of its kind, with no field that the schema lacks."""
    for document in [*render(folder), *read(KUBERNETES / "storage/loader.yaml")]:
        assert list(wrong_fields(document, version)) == [], document["kind"]


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "hybridsd-cloud", f"{BOX}/readinesProbe", {}),
        ("Deployment", "hybridsd-cloud", "spec/template/spec/terminationGracePeriodSeconds", "80s"),
        ("HorizontalPodAutoscaler", "hybridsd-cloud", "spec/metrics/0/pods/target/average", "8"),
        ("NetworkPolicy", "hybridsd-cloud", "spec/ingress/0/port", 50051),
        ("ServiceMonitor", "hybridsd-cloud", "spec/endpoints/0/intervall", "15s"),
        ("ServiceMonitor", "hybridsd-cloud", "spec/endpoints/0/scheme", "grpc"),
        ("PrometheusRule", "hybridsd", "spec/groups/0/rules/0/expression", "up"),
        ("PodDisruptionBudget", "hybridsd-cloud", "spec/maxUnavailable", [1]),
    ],
)
def test_a_wrong_field_is_found(kind: str, name: str, path: str, value: object) -> None:
    """The schemas are strict."""
    document = find(changed(render(FULL), kind, name, path, value), kind, name)

    assert list(wrong_fields(document))


# References.


@pytest.mark.parametrize("folder", OVERLAYS)
def test_every_reference_leads_somewhere(folder: str, secrets: dict[str, set[str]]) -> None:
    """Images, ports, probes, secrets, claims, metrics, selectors of labels, options, paths, and times that fit."""
    documents = render(folder)

    assert list(faults(documents, kept(), secrets)) == []
    assert list(secret_faults(documents, secrets)) == []
    loader = read(KUBERNETES / "storage/loader.yaml")
    assert list(faults(loader, kept(), secrets)) == []


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "says"),
    [
        ("Deployment", "hybridsd-cloud", f"{BOX}/image", "hybridsd-clod:0.1.0", "nothing builds"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/image", "hybridsd-cloud:0.0.9", "is not of version"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/envFrom/0/configMapRef/name", "x", "no ConfigMap"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/ports/1/containerPort", 9465, "which is no port"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/volumeMounts/0/mountPath", "/etc/hybrid", "nothing lies at"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/volumeMounts/0/name", "models", "mounts are of"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/startupProbe/exec/command/1", "prob", "no command"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/livenessProbe", None, "no livenessProbe"),
        ("Deployment", "hybridsd-gateway", f"{BOX}/readinessProbe/httpGet/port", "http", "no port http"),
        ("Deployment", "hybridsd-gateway", f"{BOX}/readinessProbe/httpGet/scheme", "HTTP", "another scheme"),
        ("Deployment", "hybridsd-gateway", f"{BOX}/livenessProbe/httpGet/scheme", None, "another scheme"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/enableServiceLinks", True, "HYBRIDSD_CLOUD_PORT"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/serviceAccountName", "x", "no ServiceAccount"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/terminationGracePeriodSeconds", 60, "is killed after 60 s"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/lifecycle/preStop/sleep/seconds", 30, "is killed after 80 s"),
        ("Deployment", "hybridsd-gateway", f"{CLOUD}/terminationGracePeriodSeconds", 10, "is killed after 10 s"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/topologySpreadConstraints/0/labelSelector/matchLabels",
         {"app": "x"}, "of other pods"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/volumes/0/secret/secretName", "x", "nobody makes"),
        ("Deployment", "hybridsd-gateway", f"{CLOUD}/volumes/2/persistentVolumeClaim/claimName", "x", "no claim"),
        ("Deployment", "hybridsd-gateway", "spec/replicas", 2, "which is one pod's"),
        ("Deployment", "hybridsd-gateway", "spec/strategy/type", "RollingUpdate", "which is one pod's"),
        ("Deployment", "hybridsd-cloud", "spec/replicas", 2, "autoscaler's"),
        ("Deployment", "hybridsd-cloud", "spec/selector/matchLabels/x", "y", "its own pods"),
        ("Service", "hybridsd-cloud", "spec/clusterIP", None, "one address for all"),
        ("Service", "hybridsd-cloud", "spec/ports/0/port", 50052, "has no port 50051"),
        ("Service", "hybridsd-cloud", "spec/ports/0/targetPort", "grcp", "no port grcp"),
        ("Service", "hybridsd-cloud-public", "spec/selector", {"app.kubernetes.io/name": "cloud"}, "0 kinds of pods"),
        ("Service", "hybridsd-cloud-public", "spec/selector", {"app.kubernetes.io/part-of": "hybridsd"}, "2 kinds"),
        ("PodDisruptionBudget", "hybridsd-cloud", "spec/selector/matchLabels", {"app": "x"}, "selects no pods"),
        ("NetworkPolicy", "hybridsd-cloud", "spec/ingress/0/ports/0/port", 50052, "nothing listens on"),
        ("NetworkPolicy", "hybridsd-gateway", "spec/egress/0/ports/0/port", 50052, "nothing listens on"),
        ("NetworkPolicy", "hybridsd-cloud", "spec/ingress/0/from/0/podSelector/matchLabels", {"a": "b"}, "lets in"),
        ("NetworkPolicy", "hybridsd-cloud", "spec/podSelector/matchLabels", {"a": "b"}, "is of no pods"),
        ("NetworkPolicy", "hybridsd-cloud-metrics", "spec/ingress/0/ports/0/port", 50051, "lets Prometheus in"),
        ("HorizontalPodAutoscaler", "hybridsd-cloud", "spec/scaleTargetRef/name", "cloud", "no Deployment cloud"),
        ("HorizontalPodAutoscaler", "hybridsd-cloud", "spec/maxReplicas", 64, "an edge uses 16"),
        ("HorizontalPodAutoscaler", "hybridsd-cloud", "spec/metrics/0/pods/metric/name", "queue", "the adapter has no"),
        ("ServiceMonitor", "hybridsd-cloud", "spec/selector/matchLabels", {"a": "b"}, "of 0 Services"),
        ("ServiceMonitor", "hybridsd-cloud", "spec/jobLabel", "app", "a job that alerts"),
        ("ServiceMonitor", "hybridsd-cloud", "spec/endpoints/0/port", "9464", "no port 9464"),
        ("ServiceMonitor", "hybridsd-cloud", "spec/endpoints/0/scheme", "http", "another scheme"),
        ("ServiceMonitor", "hybridsd-gateway", "spec/endpoints/0/authorization/credentials/key", "x", "has no x"),
    ],
)  # fmt: skip
def test_a_reference_that_leads_nowhere_is_found(
    kind: str, name: str, path: str, value: object, says: str, secrets: dict[str, set[str]]
) -> None:
    """Each of the checks sees what it is for, and no more than a few others with it."""
    documents = changed(render(FULL), kind, name, path, value)
    found = [*faults(documents, kept(), secrets), *secret_faults(documents, secrets)]

    assert any(says in fault for fault in found), found


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("HYBRIDSD_CLOUD_MAX_BACH", "8", "is no option"),
        ("HYBRIDSD_CLOUD_MAX_BATCH", "many", "'many' is not a valid integer"),
        ("HYBRIDSD_EDGE_LOG_FORMAT", "jsn", "'jsn' is not one of"),
        ("HYBRIDSD_CLOUD_MODEL", "demo=/model/cloud", "nothing lies at /model/cloud"),
        ("HYBRIDSD_CLOUD_TOKEN_FILE", "/etc/hybridsd/tokens/token.toml", "has no token.toml"),
        ("HYBRIDSD_CLOUD_PORT", "50052", "no port of the container"),
        ("HYBRIDSD_CLOUD_DRAIN_TIMEOUT", "120", "is killed after 80 s"),
        ("HYBRIDSD_EDGE_SERVER", "hybridsd-clouds:50051", "no Service hybridsd-clouds"),
        ("HYBRIDSD_EDGE_DATA_DIR", "/models/data", "nothing can be written"),
    ],
)
def test_a_wrong_option_is_found(variable: str, value: str, says: str, secrets: dict[str, set[str]]) -> None:
    """Of the ConfigMaps."""
    documents = render(FULL)
    who = "hybridsd-cloud-" if "CLOUD" in variable else "hybridsd-gateway-"
    (options,) = (
        each["data"] for each in documents
        if each["kind"] == "ConfigMap" and each["metadata"]["name"].startswith(who)
    )  # fmt: skip
    options[variable] = value

    assert any(says in fault for fault in [*faults(documents, kept(), secrets), *secret_faults(documents, secrets)])


def test_several_gateways_share_what_they_need(secrets: dict[str, set[str]]) -> None:
    """A claim of all of them, and nothing of one alone; one that is one pod's is found."""
    documents = render(MANY)
    pod = next(pod for pod in workloads(documents) if pod.name == "hybridsd-gateway")
    given = pod.environment(documents)

    assert (pod.replicas, pod.strategy) == (3, "RollingUpdate")
    assert "emptyDir" in pod.mounts()["/data"]
    assert pod.mounts()[given["HYBRIDSD_EDGE_IMAGES"]]["persistentVolumeClaim"]["claimName"] == "hybridsd-images"
    assert "password" not in given["HYBRIDSD_DATABASE"]
    claims = changed(kept(), "PersistentVolumeClaim", "hybridsd-images", "spec/accessModes", ["ReadWriteOnce"])
    assert any("which is one pod's" in fault for fault in faults(documents, claims, secrets))


def test_a_change_of_an_option_rolls_the_pods(tmp_path: Path) -> None:
    """The name of a ConfigMap has the hash of what is in it, and the Deployment follows."""
    names = {}
    for drain in ("60", "90"):
        overlay = tmp_path / drain
        overlay.mkdir()
        base = os.path.relpath(KUBERNETES / FULL, overlay)
        text = {"resources": [base], "namespace": "hybridsd", "configMapGenerator": [
            {"name": "hybridsd-cloud", "behavior": "merge", "literals": [f"HYBRIDSD_CLOUD_DRAIN_TIMEOUT={drain}"]},
        ]}  # fmt: skip
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
        command = [str(BIN / "kubectl"), "kustomize", str(overlay)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_S).stdout
        documents = list(yaml.safe_load_all(printed))
        box = find(documents, "Deployment", "hybridsd-cloud")["spec"]["template"]["spec"]["containers"][0]
        names[drain] = box["envFrom"][0]["configMapRef"]["name"]
        assert find(documents, "ConfigMap", names[drain])["data"]["HYBRIDSD_CLOUD_DRAIN_TIMEOUT"] == drain

    assert names["60"] == find_options(render(FULL))
    assert names["60"] != names["90"]


def find_options(documents: list[Document]) -> str:
    """Returns the name of the cloud's ConfigMap."""
    box = find(documents, "Deployment", "hybridsd-cloud")["spec"]["template"]["spec"]["containers"][0]
    return str(box["envFrom"][0]["configMapRef"]["name"])


# Policies.


def policy_faults(documents: list[Document]) -> Iterator[str]:
    """Yields what breaks a rule of this house that the linter does not know."""
    policies = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in policies:
        yield "not everything is forbidden that is not allowed"
    for spec in policies:
        for rule in [*spec.get("ingress", ()), *spec.get("egress", ())]:
            if not rule.get("ports") or not (rule.get("from") or rule.get("to")):
                yield "a policy opens all ports, or opens to everybody without saying so"
    if any(each["kind"] == "Secret" for each in documents):
        yield "a secret is in the repository"
    for each in documents:
        profile = each["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if each["kind"] == "Namespace" and profile != "restricted":
            yield "the namespace lets pods do more than the profile restricted"
    is_public = {
        pod.name: any(
            selects({"matchLabels": each["spec"]["selector"]}, pod.labels)
            for each in documents
            if each["kind"] == "Service" and each["spec"].get("type") in ("LoadBalancer", "NodePort")
        )
        for pod in workloads(documents)
    }
    for pod in (pod for pod in workloads(documents) if pod.kind != "Pod" and not pod.name.endswith("-head")):
        given = pod.environment(documents)
        safe = {"TLS_CERT", "TLS_KEY", "TOKEN_FILE" if "cloud" in pod.name else "CLIENT_TOKENS"}
        plain = {"INSECURE", "OPEN", "HTTP"}
        names = {name.removeprefix("HYBRIDSD_CLOUD_").removeprefix("HYBRIDSD_EDGE_") for name in given}
        if is_public[pod.name] and (not safe <= names or plain & names):
            yield f"{pod.name} is public without TLS or tokens"
        budgets = [each for each in documents if each["kind"] == "PodDisruptionBudget"]
        if not any(selects(each["spec"]["selector"], pod.labels) for each in budgets):
            yield f"{pod.name} has no budget"
        if {each["topologyKey"] for each in pod.spec["topologySpreadConstraints"]} != {
            "topology.kubernetes.io/zone", "kubernetes.io/hostname",
        }:  # fmt: skip
            yield f"{pod.name} is not spread over zones and nodes"
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}: nothing bounds {volume['name']}"
            if "secret" in volume and volume["secret"].get("defaultMode") != 0o440:
                yield f"{pod.name}: others can read {volume['name']}"
        for mount in pod.container["volumeMounts"]:
            if "subPath" in mount:
                yield f"{pod.name}: {mount['mountPath']} would not be seen to change"
        if "ephemeral-storage" not in pod.container["resources"]["limits"]:
            yield f"{pod.name} may fill the disk of its node"


@pytest.mark.parametrize("folder", FOLDERS)
def test_our_own_policies_are_kept(folder: str) -> None:
    """Default deny, no secrets, nothing public in plain text, budgets, spread, bounded disks."""
    documents = render(folder) if folder != "storage" else [*kept(), *render(PLAIN)]

    assert list(policy_faults(documents)) == []
    for each in documents:
        if each["kind"] == "RayService":
            options = each["spec"]["rayClusterConfig"]["autoscalerOptions"]  # of a container that KubeRay adds
            pod = pods_of_ray(each)[0]["spec"]["containers"][0]
            assert options["securityContext"] == pod["securityContext"]


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "says"),
    [
        ("NetworkPolicy", "deny-all", "spec/policyTypes", ["Ingress"], "not everything is forbidden"),
        ("NetworkPolicy", "deny-all", "spec/podSelector", {"matchLabels": {"a": "b"}}, "not everything is forbidden"),
        ("NetworkPolicy", "hybridsd-cloud", "spec/ingress/0/ports", None, "opens all ports"),
        ("NetworkPolicy", "hybridsd-gateway", "spec/egress/1/to", None, "opens to everybody"),
        ("PodDisruptionBudget", "hybridsd-cloud", "spec/selector/matchLabels/x", "y", "has no budget"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/topologySpreadConstraints/0/topologyKey", "rack", "not spread"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/volumes/0/secret/defaultMode", 0o444, "others can read"),
        ("Deployment", "hybridsd-cloud", f"{CLOUD}/volumes/4/emptyDir", {}, "nothing bounds"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/volumeMounts/0/subPath", "tls.crt", "not be seen to change"),
        ("Deployment", "hybridsd-cloud", f"{BOX}/resources/limits/ephemeral-storage", None, "fill the disk"),
        ("ServiceAccount", "hybridsd-cloud", "kind", "Secret", "a secret is in"),
        ("Namespace", "hybridsd", "metadata/labels/pod-security.kubernetes.io~1enforce", "baseline", "do more than"),
    ],
)  # fmt: skip
def test_a_broken_policy_of_ours_is_found(kind: str, name: str, path: str, value: object, says: str) -> None:
    """Each by a copy that breaks it."""
    documents = changed([*kept(), *render(FULL)], kind, name, path, value)

    assert any(says in fault for fault in policy_faults(documents))


@pytest.mark.parametrize("variable", ["HYBRIDSD_CLOUD_TLS_CERT", "HYBRIDSD_CLOUD_TOKEN_FILE"])
def test_a_public_server_without_tls_or_tokens_is_found(variable: str) -> None:
    """Of an overlay that has `public` and not `tls`."""
    documents = render(FULL)
    del find(documents, "ConfigMap", find_options(documents))["data"][variable]

    assert any("is public without" in fault for fault in policy_faults(documents))


def lint(files: dict[str, list[Document]], folder: Path) -> dict[str, set[str]]:
    """Runs checkov without a network; returns the ids of the policies that each file breaks."""
    for name, documents in files.items():
        (folder / name).write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [CHECKOV, "--directory", folder, "--config-file", KUBERNETES / "checkov.yaml", "--output", "json"],
        capture_output=True, text=True, check=False, timeout=HANG_S, env={**os.environ, **nowhere},
    )  # fmt: skip
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise AssertionError(done.stdout[-2000:] + done.stderr[-2000:]) from None
    if "results" not in report:
        raise AssertionError(report)
    assert report["summary"]["parsing_errors"] == 0
    found: dict[str, set[str]] = {name: set() for name in files}
    for check in report["results"]["failed_checks"]:
        found[Path(check["file_path"]).name].add(check["check_id"])
    return found


POD = ("Deployment", "hybridsd-cloud")
BREAKS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "root": ("CKV_K8S_23", lambda spec: spec["securityContext"].update(runAsNonRoot=False, runAsUser=0)),
    "low user": ("CKV_K8S_40", lambda spec: spec["securityContext"].update(runAsUser=1000)),
    "seccomp": ("CKV_K8S_31", lambda spec: spec["securityContext"].pop("seccompProfile")),
    "writable": ("CKV_K8S_22", lambda spec: box(spec)["securityContext"].update(readOnlyRootFilesystem=False)),
    "escalation": ("CKV_K8S_20", lambda spec: box(spec)["securityContext"].update(allowPrivilegeEscalation=True)),
    "privileged": ("CKV_K8S_16", lambda spec: box(spec)["securityContext"].update(privileged=True)),
    "capabilities": ("CKV_K8S_37", lambda spec: box(spec)["securityContext"].pop("capabilities")),
    "liveness": ("CKV_K8S_8", lambda spec: box(spec).pop("livenessProbe")),
    "readiness": ("CKV_K8S_9", lambda spec: box(spec).pop("readinessProbe")),
    "cpu": ("CKV_K8S_10", lambda spec: box(spec)["resources"]["requests"].pop("cpu")),
    "cpu limit": ("CKV_K8S_11", lambda spec: box(spec)["resources"]["limits"].pop("cpu")),
    "memory": ("CKV_K8S_12", lambda spec: box(spec)["resources"]["requests"].pop("memory")),
    "memory limit": ("CKV_K8S_13", lambda spec: box(spec)["resources"]["limits"].pop("memory")),
    "tag": ("CKV_K8S_14", lambda spec: box(spec).update(image="hybridsd-cloud:latest")),
    "host network": ("CKV_K8S_19", lambda spec: spec.update(hostNetwork=True)),
    "host processes": ("CKV_K8S_17", lambda spec: spec.update(hostPID=True)),
    "account": ("CKV_K8S_38", lambda spec: spec.update(automountServiceAccountToken=True)),
    "secret": ("CKV_K8S_35", lambda spec: box(spec)["env"].append(
        {"name": "X", "valueFrom": {"secretKeyRef": {"name": "hybridsd-metrics", "key": "token"}}})),
    "docker": ("CKV_K8S_27", lambda spec: spec["volumes"].append(
        {"name": "docker", "hostPath": {"path": "/var/run/docker.sock"}})),
}  # fmt: skip
"""Policies of the linter with what breaks each."""


def box(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["containers"][0]
    return found


def test_the_policy_linter_finds_nothing_but_what_is_broken(tmp_path: Path) -> None:
    """checkov passes what is rendered, and for each policy fails the copy that breaks it."""
    assert CHECKOV.exists(), "make test installs checkov into .venv/checkov"
    files = {
        folder.replace("/", "-") + ".yaml": [*(kept() if folder != PLAIN else []), *render(folder)]
        for folder in OVERLAYS
    }  # fmt: skip
    (ray,) = (each for each in render(RAY) if each["kind"] == "RayService")
    files |= {f"ray-{number}.yaml": [pod] for number, pod in enumerate(pods_of_ray(ray))}
    files["loader.yaml"] = [*read(KUBERNETES / "storage/loader.yaml"), *files["overlays-demo.yaml"]]
    for number, (_, breaks) in enumerate(BREAKS.values()):
        document = copy.deepcopy(find(render(FULL), *POD))
        document["metadata"]["name"] = f"broken-{number}"
        breaks(document["spec"]["template"]["spec"])
        files[f"broken-{number}.yaml"] = [document]
    found = lint(files, tmp_path)

    for name in (*(folder.replace("/", "-") + ".yaml" for folder in OVERLAYS), "loader.yaml"):
        assert found[name] == set()
    # KubeRay adds probes where there are none, and an autoscaler to the head, which asks the API for pods.
    assert found["ray-0.yaml"] == {"CKV_K8S_8", "CKV_K8S_9", "CKV_K8S_38"}
    assert found["ray-1.yaml"] == {"CKV_K8S_8"}
    for number, (what, (wanted, _)) in enumerate(BREAKS.items()):
        assert wanted in found[f"broken-{number}.yaml"], what


def test_what_the_linter_leaves_out_has_a_reason() -> None:
    """Two policies, each with a comment."""
    lines = (KUBERNETES / "checkov.yaml").read_text(encoding="utf-8").splitlines()

    assert len([line for line in lines if re.fullmatch(r"  - CKV_K8S_\d+ # .{20,}", line)]) == 2
    assert len([line for line in lines if "CKV" in line]) == 2


# What is made from something else.


def test_the_rule_is_that_of_prometheus(tmp_path: Path) -> None:
    """The generated file is up to date, says the same, and a change of either is found."""
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    check = [sys.executable, str(KUBERNETES / "make_rule.py"), "--check"]

    assert find(render(FULL), "PrometheusRule", "hybridsd")["spec"] == alerts
    assert subprocess.run(check, check=False, timeout=HANG_S).returncode == 0
    copied = tmp_path / "kubernetes"
    (copied / "components/monitoring").mkdir(parents=True)
    (tmp_path / "prometheus").mkdir()
    for path in ("kubernetes/make_rule.py", "kubernetes/components/monitoring/rule.yaml", "prometheus/alerts.yml"):
        (tmp_path / path).write_bytes((ROOT / "deploy" / path).read_bytes())
    with (tmp_path / "prometheus/alerts.yml").open("a", encoding="utf-8") as stream:
        stream.write("      - {alert: New, expr: up}\n")
    done = subprocess.run(
        [sys.executable, str(copied / "make_rule.py"), "--check"], check=False, timeout=HANG_S, capture_output=True
    )
    assert (done.returncode, b"make_rule.py" in done.stderr) == (1, True)


def test_the_adapter_asks_by_pod_and_names_what_the_autoscaler_wants() -> None:
    """Its queries keep the labels that tell pods apart, once its template is filled in, as it does."""
    wanted = {
        metric["pods"]["metric"]["name"]
        for metric in find(render(FULL), "HorizontalPodAutoscaler", "hybridsd-cloud")["spec"]["metrics"]
    }

    assert set(adapted()) == wanted
    for rule in adapted().values():
        series = rule["seriesQuery"].partition("{")[0]
        (asked,) = parse(rule["seriesQuery"]).selectors
        labels = {"namespace", "pod"}
        assert {(name, operator, value) for name, operator, value in asked.matchers} == {
            (label, "!=", "") for label in labels
        }
        assert set(rule["resources"]["overrides"]) == labels
        query = rule["metricsQuery"]
        for name, text in (
            ("Series", series), ("LabelMatchers", 'namespace="hybridsd",pod="a"'), ("GroupBy", "namespace,pod"),
        ):  # fmt: skip
            query = query.replace(f"<<.{name}>>", text)
        parsed = parse(query)
        assert all({label for label, *_ in each.matchers} == labels for each in parsed.selectors)
        assert all(grouping == labels for _, grouping in parsed.groupings)
        assert parsed.groupings


def test_images_have_the_user_that_pods_run_as() -> None:
    """And the names that compose builds them under; Ray's is built on the cloud's."""
    for folder in OVERLAYS:
        for pod in workloads(render(folder)):
            below = {"hybridsd-ray": "hybridsd-cloud"}.get(pod.image, pod.image)
            text = (ROOT / ENTRYPOINTS[below]).read_text(encoding="utf-8")
            assert f"--uid {pod.spec['securityContext']['runAsUser']} " in text
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert {compose[name]["image"].partition(":")[0] for name in ("cloud", "gateway")} == {*ENTRYPOINTS} - {
        "hybridsd-ray"
    }
    steps = instructions(ENTRYPOINTS["hybridsd-ray"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert ("ARG", f"CLOUD=hybridsd-cloud:{version}") in steps
    assert [words for name, words in steps if name == "USER"][-1] == "hybridsd"
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    }
    copied = {words.split()[0] for name, words in steps if name == "COPY"}
    assert copied <= allowed
    assert all((ROOT / path).exists() for path in copied - {"deploy/ray"}), copied


RAY_BREAKS = [
    ("template/spec/containers/0/image", "hybridsd-rai:0.1.0", "nothing builds"),
    ("template/spec/containers/0/envFrom/1/configMapRef/name", "x", "no ConfigMap"),
    ("template/spec/containers/0/volumeMounts/2/mountPath", "/model", "nothing lies at"),
    ("template/spec/volumes/0/secret/secretName", "x", "nobody makes"),
    ("template/metadata/labels/app.kubernetes.io~1component", "cloud", "0 kinds of pods"),
    ("template/spec/enableServiceLinks", True, "HYBRIDSD_CLOUD_PORT"),
]


@pytest.mark.parametrize(("path", "value", "says"), RAY_BREAKS)
def test_a_wrong_reference_of_ray_is_found(path: str, value: object, says: str, secrets: dict[str, set[str]]) -> None:
    """Of its workers; and a field that KubeRay does not know."""
    where = f"spec/rayClusterConfig/workerGroupSpecs/0/{path}"
    documents = changed(render(RAY), "RayService", "hybridsd-cloud", where, value)

    assert any(says in fault for fault in [*faults(documents, kept(), secrets), *secret_faults(documents, secrets)])
    wrong = changed(render(RAY), "RayService", "hybridsd-cloud", where.partition("/template")[0] + "/replica", 2)
    assert list(wrong_fields(find(wrong, "RayService", "hybridsd-cloud")))
    wrong = changed(
        render(RAY), "RayService", "hybridsd-cloud", where.partition("/template")[0] + "/template/spec/x", 2
    )
    assert list(wrong_fields(find(wrong, "RayService", "hybridsd-cloud")))


def test_ray_runs_the_application_of_deploy_ray() -> None:
    """With its configuration and variables, but for the models and how much there may be."""

    def rest_of(config: dict[str, Any]) -> dict[str, Any]:
        (application,) = config["applications"]
        application["args"]["options"] = None
        (deployment,) = application["deployments"]
        del deployment["ray_actor_options"]
        for name in ("min_replicas", "max_replicas"):
            del deployment["autoscaling_config"][name]
        return config

    (service,) = (each for each in render(RAY) if each["kind"] == "RayService")
    ours = yaml.safe_load(service["spec"]["serveConfigV2"])
    (replicas,) = ours["applications"][0]["deployments"]
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]

    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={cluster['rayVersion']}" in pinned
    assert ours["applications"][0]["args"]["options"] == ""  # HYBRIDSD_CLOUD_MODEL says it
    assert replicas["ray_actor_options"] == {"num_cpus": int(limit)}  # one replica fills a pod
    assert replicas["autoscaling_config"]["max_replicas"] == group["maxReplicas"] <= MAX_SERVERS
    assert replicas["autoscaling_config"]["min_replicas"] == group["minReplicas"]
    assert ours["grpc_options"]["port"] == group["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert rest_of(ours) == rest_of(yaml.safe_load((OF_RAY / "serve_config.yaml").read_text(encoding="utf-8")))
    lines = (OF_RAY / "node.env").read_text(encoding="utf-8").splitlines()
    pairs = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    (given,) = (
        each["data"] for each in render(RAY)
        if each["kind"] == "ConfigMap" and each["metadata"]["name"].startswith("hybridsd-ray")
    )  # fmt: skip
    assert given == pairs


def test_the_document_names_folders_that_are_there() -> None:
    """Every -k and -f of its commands is rendered here, and what it says of policies and metrics is so."""
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    lines = [shlex.split(line) for line in re.findall(r"^(?:kubectl|helm) .*", text, re.MULTILINE)]
    paths = {words[words.index(flag) + 1] for words in lines for flag in ("-k", "-f") if flag in words} - {"-", "my"}

    assert {"deploy/kubernetes/overlays/demo", "deploy/kubernetes/storage/loader.yaml"} <= paths
    for path in paths:
        assert (ROOT / path).is_file() or path.removeprefix("deploy/kubernetes/") in FOLDERS, path
    components = {path.parent.name for path in KUBERNETES.glob("components/*/kustomization.yaml")}
    assert components <= set(re.findall(r"`(\w+)`", text))
    overlays = [read(KUBERNETES / folder / "kustomization.yaml")[0] for folder in OVERLAYS]
    used = {Path(name).name for overlay in overlays for name in overlay.get("components", ())}
    assert components == used


def test_the_documents_own_overlay_can_be_rendered(tmp_path: Path, secrets: dict[str, set[str]]) -> None:
    """As it stands there, in a folder beside deploy/."""
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    (overlay,) = re.findall(r"```yaml\n# my/kustomization.yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "my").mkdir()
    (tmp_path / "my/kustomization.yaml").write_text(overlay, encoding="utf-8")
    command = [str(BIN / "kubectl"), "kustomize", str(tmp_path / "my")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    documents = [each for each in yaml.safe_load_all(done.stdout) if each]

    assert list(faults(documents, kept(), secrets)) == []
    images = {pod.container["image"] for pod in workloads(documents)}
    assert images == {"registry.example.org/hybridsd-cloud:0.1.0", "registry.example.org/hybridsd-edge:0.1.0"}
