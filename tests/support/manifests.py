"""The manifests of deploy/kubernetes as kubectl renders them, and what in them points at nothing."""

import copy
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click

from cloud_server.cli import main as cloud_program
from cloud_server.rpc.server import JOIN_S, STATUS_S
from deploy.run_demo import BIN, ROOT
from edge_client.cli.main import main as edge_program
from edge_client.cloud.pool import MAX_SERVERS

KUBERNETES = ROOT / "deploy/kubernetes"
ENTRYPOINTS = {
    "hybridsd-cloud": "deploy/cloud.Dockerfile",
    "hybridsd-edge": "deploy/edge.Dockerfile",
    "hybridsd-ray": "deploy/ray.Dockerfile",
}
"""Our images, and what they are built from."""
PROGRAMS: dict[str, click.Command] = {"hybridsd": edge_program, "hybridsd-cloud": cloud_program}
PREFIXES = {"hybridsd": "HYBRIDSD_EDGE_", "hybridsd-cloud": "HYBRIDSD_CLOUD_"}
OF_RAY = (6379, 8265)
"""Ports of its head."""
NO_OPTIONS = {"HYBRIDSD_EDGE_CACHE"}
"""Variables that are no option."""
GRACEFUL_SHUTDOWN_S = 5
"""Of the gateway: for requests at its end."""
MONITORING = "monitoring"
"""The namespace of Prometheus."""

Document = dict[str, Any]


@cache
def _rendered(folder: str) -> str:
    done = subprocess.run(
        [BIN / "kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecated fields are said there
    return done.stdout


def render(folder: str) -> list[Document]:
    """Returns what a folder with a kustomization makes, as new objects."""
    import yaml

    return [document for document in yaml.safe_load_all(_rendered(folder)) if document]


def read(path: Path) -> list[Document]:
    """Returns the documents of a file."""
    import yaml

    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def find(documents: list[Document], kind: str, name: str) -> Document:
    """Returns the one document of a kind and name."""
    (found,) = (each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Returns the instructions of a Dockerfile and what they say."""
    text = (ROOT / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


@dataclass(frozen=True)
class Workload:
    """A template of pods with what owns it."""

    kind: str
    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    replicas: int | None
    """None where an autoscaler says."""
    strategy: str

    @property
    def container(self) -> dict[str, Any]:
        """The only one."""
        (container,) = self.spec["containers"]
        found: dict[str, Any] = container
        return found

    @property
    def image(self) -> str:
        """Without its tag and registry."""
        return str(self.container["image"]).rpartition(":")[0].rpartition("/")[2]

    @property
    def command(self) -> list[str]:
        """What runs in it: the entry point of the image, or what stands in its place, and the arguments.

        Of a node of Ray, which KubeRay starts, the command whose options its variables are.
        """
        if self.kind == "RayService":
            return ["hybridsd-cloud", "serve"]
        (entry,) = [json.loads(words) for name, words in instructions(ENTRYPOINTS[self.image]) if name == "ENTRYPOINT"]
        return [*self.container.get("command", entry), *self.container.get("args", ())]

    def environment(self, documents: list[Document]) -> dict[str, str]:
        """Returns the variables that the pod sets."""
        found: dict[str, str] = {}
        for source in self.container.get("envFrom", ()):
            found |= next(
                (each["data"] for each in documents if each["kind"] == "ConfigMap"
                 and each["metadata"]["name"] == source["configMapRef"]["name"]), {},
            )  # fmt: skip
        for variable in self.container.get("env", ()):
            if "value" in variable:
                found[variable["name"]] = variable["value"]
            elif "resourceFieldRef" in variable["valueFrom"]:
                part, what = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
                found[variable["name"]] = str(self.container["resources"][part][what])
            else:
                found[variable["name"]] = "of a secret"
        return found

    def ports(self) -> dict[str, int]:
        """Returns the ports by name."""
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    def mounts(self) -> dict[str, dict[str, Any]]:
        """Returns for each path the volume that lies there."""
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", ())}
        return {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in self.container.get("volumeMounts", ())}


def workloads(documents: list[Document]) -> Iterator[Workload]:
    """Yields all templates of pods, and pods."""
    for each in documents:
        name = each["metadata"]["name"]
        if each["kind"] == "Deployment":
            template, strategy = each["spec"]["template"], each["spec"]["strategy"]["type"]
            labels, replicas = template["metadata"]["labels"], each["spec"].get("replicas")
            yield Workload("Deployment", name, labels, template["spec"], replicas, strategy)
        elif each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                template, part = group["template"], group.get("groupName", "head")
                labels = {"ray.io/node-type": "worker" if "groupName" in group else "head"}
                labels |= template["metadata"]["labels"]
                replicas = group.get("minReplicas", 1)
                yield Workload("RayService", f"{name}-{part}", labels, template["spec"], replicas, "")
        elif each["kind"] == "Pod":
            yield Workload("Pod", name, each["metadata"]["labels"], each["spec"], 1, "")


def options_of(program: str, *commands: str) -> dict[str, click.Option]:
    """Returns the options of a program's commands by the variable that sets each."""
    group, found = PROGRAMS[program], {}
    assert isinstance(group, click.Group)
    for name in commands:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        for option in (each for each in command.params if isinstance(each, click.Option)):
            names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or [
                PREFIXES[program] + str(option.name).upper()
            ]  # fmt: skip
            found.update(dict.fromkeys(map(str, names), option))
    return found


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Returns whether a label selector takes what has these labels; an empty one takes everything."""
    assert set(selector) <= {"matchLabels"}, selector
    return set(selector.get("matchLabels", {}).items()) <= set(labels.items())


def faults(documents: list[Document], kept: list[Document], secrets: dict[str, set[str]]) -> Iterator[str]:
    """Yields every reference that leads nowhere, and every number that contradicts another.

    Args:
        documents: Of an overlay.
        kept: What is applied before it: namespace and claims.
        secrets: Names of the secrets that an operator makes, with their keys.
    """
    pods = list(workloads(documents))
    for each in documents:
        if each["metadata"].get("namespace", "") != "hybridsd" and each["kind"] != "Namespace":
            yield f"{each['kind']} {each['metadata']['name']} is in no namespace of ours"
    for pod in pods:
        yield from _faults_of_pod(pod, documents, kept, secrets)
    for each in documents:
        for fault in _faults_of_reference(each, documents, pods, secrets):
            yield f"{each['kind']} {each['metadata']['name']}: {fault}"


def _faults_of_pod(
    pod: Workload, documents: list[Document], kept: list[Document], secrets: dict[str, set[str]]
) -> Iterator[str]:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    where, container = f"{pod.kind} {pod.name}", pod.container
    if pod.image not in ENTRYPOINTS:
        yield f"{where}: nothing builds the image {pod.image}"
        return
    if not container["image"].endswith(f":{version}"):
        yield f"{where}: {container['image']} is not of version {version}"
    everything = [*documents, *kept]
    known = {(each["kind"], each["metadata"]["name"]) for each in everything}
    for source in container.get("envFrom", ()):
        if ("ConfigMap", source["configMapRef"]["name"]) not in known:
            yield f"{where}: there is no ConfigMap {source['configMapRef']['name']}"
            return
    account = pod.spec.get("serviceAccountName")
    if account is not None and ("ServiceAccount", account) not in known:
        yield f"{where}: there is no ServiceAccount {account}"
    if pod.spec.get("enableServiceLinks") is not False:
        yield f"{where}: a Service named hybridsd-cloud would set the option HYBRIDSD_CLOUD_PORT"
    yield from (f"{where}: {fault}" for fault in _faults_of_volumes(pod, everything, secrets))
    if pod.kind != "Pod":
        yield from (f"{where}: {fault}" for fault in _faults_of_options(pod, documents))
        if pod.kind == "Deployment":
            yield from (f"{where}: {fault}" for fault in _faults_of_probes(pod, documents))
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            if not selects(spread["labelSelector"], pod.labels):
                yield f"{where}: the spread over {spread['topologyKey']} is of other pods"


def _faults_of_volumes(pod: Workload, everything: list[Document], secrets: dict[str, set[str]]) -> Iterator[str]:
    names = {volume["name"] for volume in pod.spec.get("volumes", ())}
    used = {mount["name"] for mount in pod.container.get("volumeMounts", ())}
    if names != used:
        yield f"volumes are {sorted(names)}, mounts are of {sorted(used)}"
    for volume in pod.spec.get("volumes", ()):
        if "secret" in volume and volume["secret"]["secretName"] not in secrets:
            yield f"nobody makes the secret {volume['secret']['secretName']}"
        if "persistentVolumeClaim" in volume:
            name = volume["persistentVolumeClaim"]["claimName"]
            claims = [each for each in everything if each["kind"] == "PersistentVolumeClaim"]
            found = [claim for claim in claims if claim["metadata"]["name"] == name]
            if not found:
                yield f"there is no claim {name}"
            elif (
                found[0]["spec"]["accessModes"] == ["ReadWriteOnce"]
                and not volume["persistentVolumeClaim"].get("readOnly")
                and pod.kind == "Deployment"
                and (pod.replicas, pod.strategy) != (1, "Recreate")
            ):
                yield f"several pods would share the claim {name}, which is one pod's"


def _faults_of_options(pod: Workload, documents: list[Document]) -> Iterator[str]:
    """Variables are options, ports are ports, files lie in volumes, and what is written can be written."""
    program, command = pod.command[0], pod.command[1]
    options, given = options_of(program, command, "probe"), pod.environment(documents)
    for name, value in given.items():
        if name.startswith("HYBRIDSD_") and name not in options and name not in NO_OPTIONS:
            yield f"{name} is no option of {program}"
        elif name in options and not isinstance(options[name].type, click.Path):
            for word in value.split() if options[name].multiple else [value]:
                try:
                    options[name].type.convert(word, options[name], None)
                except click.BadParameter as error:
                    yield f"{name}: {error.message}"
    for name, port in pod.ports().items():
        if str(port) not in given.values() and port not in OF_RAY:
            yield f"nothing listens on port {name}, {port}"
    for name in (f"{PREFIXES[program]}PORT", f"{PREFIXES[program]}METRICS_PORT"):
        if name in given and int(given[name]) not in pod.ports().values():
            yield f"{name} is {given[name]}, which is no port of the container"
    mounts = pod.mounts()
    for name, value in given.items():
        for path in re.findall(r"(?:^|[=\s])(/[^\s]*)", value):
            folder = next((mount for mount in mounts if path == mount or path.startswith(f"{mount}/")), None)
            if folder is None:
                yield f"{name}: nothing lies at {path}"
            elif "secret" in mounts[folder] and "secretName" in mounts[folder]["secret"]:
                pass  # its keys are looked at with the secret
            elif name.endswith(("_DATA_DIR", "_CACHE")):
                claim = mounts[folder].get("persistentVolumeClaim", {"readOnly": "emptyDir" not in mounts[folder]})
                if claim.get("readOnly"):
                    yield f"{name}: nothing can be written to {path}"
    servers = given.get("HYBRIDSD_EDGE_SERVER")
    for server in servers.split() if servers else ():
        host, _, port = server.rpartition(":")
        clouds = [each for each in documents if (each["kind"], each["metadata"]["name"]) == ("Service", host)]
        if not clouds:
            yield f"there is no Service {host}"
        elif int(port) not in {each["port"] for each in clouds[0]["spec"]["ports"]}:
            yield f"Service {host} has no port {port}"
        elif clouds[0]["spec"].get("clusterIP") != "None":
            yield f"Service {host} has one address for all pods: nobody could balance by load"


def secret_faults(documents: list[Document], secrets: dict[str, set[str]]) -> Iterator[str]:
    """Yields every file of a secret that an option names and that the secret does not have."""
    for pod in workloads(documents):
        mounts = pod.mounts()
        for name, value in pod.environment(documents).items() if pod.kind != "Pod" else ():
            for mount, volume in mounts.items():
                key = value.removeprefix(f"{mount}/")
                secret = volume.get("secret", {}).get("secretName")
                if value.startswith(f"{mount}/") and secret is not None and key not in secrets.get(secret, set()):
                    yield f"{pod.name}: {name} is {value}; secret {secret} has no {key}"


def _faults_of_probes(pod: Workload, documents: list[Document]) -> Iterator[str]:
    given, container = pod.environment(documents), pod.container
    program = pod.command[0]
    speaks_tls = f"{PREFIXES[program]}TLS_CERT" in given
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(name)
        if probe is None:
            yield f"there is no {name}"
        elif "httpGet" in probe:
            if probe["httpGet"]["port"] not in pod.ports():
                yield f"{name}: there is no port {probe['httpGet']['port']}"
            if (probe["httpGet"].get("scheme", "HTTP") == "HTTPS") != speaks_tls:
                yield f"{name} speaks another scheme than the server"
        else:
            words = probe["exec"]["command"]
            if words[0] not in PROGRAMS or words[1] not in getattr(PROGRAMS[words[0]], "commands", {}):
                yield f"{name}: there is no command {' '.join(words)}"
            if program == "hybridsd-cloud" and ("HYBRIDSD_CLOUD_TLS" in given) != speaks_tls:
                yield f"{name} speaks TLS where the server does not, or the other way round"
    leaves = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drains = float(given["HYBRIDSD_CLOUD_DRAIN_TIMEOUT"]) if program == "hybridsd-cloud" else GRACEFUL_SHUTDOWN_S
    needed = leaves + drains + STATUS_S + JOIN_S
    if pod.spec["terminationGracePeriodSeconds"] < needed:
        yield f"is killed after {pod.spec['terminationGracePeriodSeconds']} s, but may take {needed:g} s to end"


def _faults_of_reference(
    each: Document, documents: list[Document], pods: list[Workload], secrets: dict[str, set[str]]
) -> Iterator[str]:
    spec, kind = each.get("spec", {}), each["kind"]
    if kind == "Deployment":
        template = spec["template"]["metadata"]["labels"]
        if not selects(spec["selector"], template):
            yield "does not select its own pods"
        scaled = [other["spec"]["scaleTargetRef"] for other in documents if other["kind"] == "HorizontalPodAutoscaler"]
        if "replicas" in spec and each["metadata"]["name"] in [target["name"] for target in scaled]:
            yield "its replicas are the autoscaler's to say"
    if kind == "Service":
        chosen = [pod for pod in pods if selects({"matchLabels": spec["selector"]}, pod.labels)]
        if len(chosen) != 1:
            yield f"is of {len(chosen)} kinds of pods"
        for port in spec["ports"]:
            if chosen and port["targetPort"] not in chosen[0].ports():
                yield f"there is no port {port['targetPort']}"
    if kind == "PodDisruptionBudget" and sum(selects(spec["selector"], pod.labels) for pod in pods) != 1:
        yield "selects no pods"
    if kind == "NetworkPolicy":
        yield from _faults_of_policy(spec, pods)
    if kind == "HorizontalPodAutoscaler":
        target = spec["scaleTargetRef"]
        known = {(other["kind"], other["metadata"]["name"]) for other in documents}
        if (target["kind"], target["name"]) not in known:
            yield f"there is no {target['kind']} {target['name']}"
        if spec["maxReplicas"] > MAX_SERVERS:
            yield f"of {spec['maxReplicas']} pods an edge uses {MAX_SERVERS}"
        for metric in spec["metrics"]:
            if metric["pods"]["metric"]["name"] not in adapted():
                yield f"the adapter has no {metric['pods']['metric']['name']}"
    if kind == "ServiceMonitor":
        yield from _faults_of_monitor(spec, documents, pods, secrets)


def _faults_of_policy(spec: dict[str, Any], pods: list[Workload]) -> Iterator[str]:
    chosen = [pod for pod in pods if selects(spec["podSelector"], pod.labels)]
    if not chosen:
        yield "is of no pods"
    for rule in spec.get("ingress", ()):
        for port in rule["ports"]:
            if "endPort" not in port and any(port["port"] not in pod.ports().values() for pod in chosen):
                yield f"nothing listens on {port['port']}"
        for peer in rule["from"]:
            is_ours = "podSelector" in peer and "namespaceSelector" not in peer
            if is_ours and not any(selects(peer["podSelector"], pod.labels) for pod in pods):
                yield "lets in pods that are not there"
    for rule in spec.get("egress", ()):
        for peer in rule["to"]:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                asked = [pod for pod in pods if selects(peer["podSelector"], pod.labels)]
                if not asked:
                    yield "lets out to pods that are not there"
                for port in rule["ports"]:
                    if "endPort" not in port and any(port["port"] not in pod.ports().values() for pod in asked):
                        yield f"nothing listens on {port['port']} there"


def _faults_of_monitor(
    spec: dict[str, Any], documents: list[Document], pods: list[Workload], secrets: dict[str, set[str]]
) -> Iterator[str]:
    services = [
        each for each in documents
        if each["kind"] == "Service" and selects(spec["selector"], each["metadata"].get("labels", {}))
    ]  # fmt: skip
    if len(services) != 1:
        yield f"is of {len(services)} Services"
        return
    if not re.fullmatch("hybridsd-(cloud|gateway)", services[0]["metadata"]["labels"].get(spec["jobLabel"], "")):
        yield "its series would have a job that alerts and dashboards do not know"
    (endpoint,) = spec["endpoints"]
    ports = {port["name"]: port["targetPort"] for port in services[0]["spec"]["ports"]}
    if endpoint["port"] not in ports:
        yield f"the Service has no port {endpoint['port']}"
        return
    (pod,) = (each for each in pods if selects({"matchLabels": services[0]["spec"]["selector"]}, each.labels))
    if pod.image not in ENTRYPOINTS:
        return
    speaks_tls = f"{PREFIXES[pod.command[0]]}TLS_CERT" in pod.environment(documents)
    if (endpoint.get("scheme", "http") == "https") != speaks_tls:
        yield "speaks another scheme than the server"
    token = endpoint.get("authorization", {}).get("credentials")
    authority = endpoint.get("tlsConfig", {}).get("ca", {}).get("secret")
    for reference in filter(None, (token, authority)):
        if reference["key"] not in secrets.get(reference["name"], set()):
            yield f"secret {reference['name']} has no {reference['key']}"
    number = pod.ports().get(ports[endpoint["port"]])
    policies = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    if not any(
        selects(policy["podSelector"], pod.labels)
        and any(
            peer.get("namespaceSelector", {}).get("matchLabels") == {"kubernetes.io/metadata.name": MONITORING}
            and number in [port["port"] for port in rule["ports"]]
            for rule in policy.get("ingress", ())
            for peer in rule["from"]
        )
        for policy in policies
    ):
        yield f"no policy lets Prometheus in to port {number}"


@cache
def adapted() -> dict[str, dict[str, Any]]:
    """Returns the rules of the custom-metrics adapter by the metric that each makes."""
    (values,) = read(KUBERNETES / "components/autoscaling/prometheus-adapter.yaml")
    rules = values["rules"]["custom"]
    return {rule.get("name", {}).get("as") or rule["seriesQuery"].partition("{")[0]: rule for rule in rules}


def changed(documents: list[Document], kind: str, name: str, path: str, value: Any) -> list[Document]:
    """Returns a copy with one value set, or taken away where it is None; the path is as in a JSON patch."""
    result = copy.deepcopy(documents)
    place: Any = find(result, kind, name)
    *way, last = [int(word) if word.isdigit() else word.replace("~1", "/") for word in path.split("/")]
    for word in way:
        place = place[word]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result
