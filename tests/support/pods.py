"""Pods of deploy/kubernetes as processes of this machine: their commands, variables, volumes and probes.

What a kubelet does, as far as our programs see it: folders of secrets that are swapped behind a link, the name of a
headless Service with the address of each pod, probes at the pod's address, SIGTERM with a grace period.
"""

import os
import re
import signal
import ssl
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deploy.run_demo import BIN, DEMO, ENVIRONMENT
from tests.support.manifests import ENTRYPOINTS as IMAGES
from tests.support.manifests import Document, Workload, instructions
from tests.support.patience import HANG_S
from tests.support.web_processes import free_port

NAMES = """\
import os, socket
_known = dict(pair.split("=") for pair in os.environ.get("TEST_NAMES", "").split())
_really = socket.getaddrinfo
def getaddrinfo(host, port, *args, **kwargs):
    if host not in _known:
        return _really(host, port, *args, **kwargs)
    return [each for address in _known[host].split(",") for each in _really(address, port, *args, **kwargs)]
socket.getaddrinfo = getaddrinfo
"""
"""Imported by each process at its start: the cluster's DNS."""


def put_secret(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a secret as the kubelet does: files are links into a folder behind a link, which is swapped at once."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..{time.monotonic_ns()}"
    version.mkdir()
    for name, content in files.items():
        path = version / name
        path.write_bytes(content)
        path.chmod(0o440)
    new = folder / "..data_tmp"
    new.symlink_to(version.name)
    new.rename(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


@dataclass
class Cluster:
    """What the pods of a test share."""

    folder: Path
    documents: list[Document]
    secrets: dict[str, dict[str, bytes]]
    names: dict[str, list[str]] = field(default_factory=dict)
    """Addresses of Services."""
    pods: list["Pod"] = field(default_factory=list)
    grpc_port: int = field(default_factory=free_port)
    """In place of 50051, at each address."""

    def __post_init__(self) -> None:
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(NAMES, encoding="utf-8")

    def secret(self, name: str) -> Path:
        """Returns the folder in which a secret lies."""
        return self.folder / "secrets" / name

    def rotate(self, name: str, files: Mapping[str, bytes]) -> None:
        """Puts other files into a secret, while pods run."""
        self.secrets[name] = dict(files)
        put_secret(self.secret(name), files)

    def start(self, workload: Workload, address: str = "127.0.0.1") -> "Pod":
        """Starts a pod, and gives its Services its address."""
        pod = Pod(self, workload, address, len(self.pods))
        self.pods.append(pod)
        for each in self.documents:
            if each["kind"] == "Service" and each["spec"]["selector"].items() <= workload.labels.items():
                self.names.setdefault(each["metadata"]["name"], []).append(address)
        pod.start()
        return pod

    def end(self) -> None:
        """Ends all pods."""
        for pod in reversed(self.pods):
            if pod.process.poll() is None:
                pod.process.terminate()
        for pod in self.pods:
            pod.process.wait(timeout=HANG_S)


class Pod:
    """One process."""

    process: subprocess.Popen[bytes]

    def __init__(self, cluster: Cluster, workload: Workload, address: str, number: int) -> None:
        self.cluster, self.workload, self.address = cluster, workload, address
        self.folder = cluster.folder / f"pod-{number}"
        self.folder.mkdir()
        self.ports = {
            name: cluster.grpc_port if name == "grpc" else free_port() for name in workload.ports()
        }  # fmt: skip
        self.places = {path: self._place(path, volume) for path, volume in workload.mounts().items()}
        self.log = self.folder / "log"

    def _place(self, path: str, volume: dict[str, Any]) -> Path:
        """Returns what lies at a path of the container."""
        if "secret" in volume:
            name = volume["secret"]["secretName"]
            folder = self.cluster.secret(name)
            if not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                put_secret(folder, self.cluster.secrets[name])
            return folder
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        above = self.cluster.folder if claim == "hybridsd-images" else self.folder
        folder = above / path.strip("/").replace("/", "-")
        folder.mkdir(exist_ok=True)
        if claim == "hybridsd-models":  # as the document fills it
            (folder / "cloud").symlink_to(DEMO / "large")
            (folder / "edge").symlink_to(DEMO / "edge")
        return folder

    def _here(self, text: str) -> str:
        """Returns a value with paths, ports and addresses of this machine."""
        paths = "|".join(re.escape(path) for path in sorted(self.places, key=len, reverse=True))
        return re.sub(rf"(^|[=\s])({paths})(?=/|$|\s)", lambda match: f"{match[1]}{self.places[match[2]]}", text)

    def environment(self) -> dict[str, str]:
        """Returns the variables: those of the image, then those of the pod."""
        image = [words for name, words in instructions(IMAGES[self.workload.image]) if name == "ENV"]
        of_image = dict(pair.split("=", 1) for words in image for pair in words.split())
        del of_image["PATH"]
        given = {**of_image, **self.workload.environment(self.cluster.documents)}
        ports = {str(self.workload.ports()[name]): str(port) for name, port in self.ports.items()}
        found = {}
        for name, value in given.items():
            if name.endswith("_PORT"):
                value = ports[value]
            elif name.endswith("_SERVER"):
                host, addresses = value.partition(":")[0], self.cluster.names.get(value.partition(":")[0], [])
                host = addresses[0] if len(addresses) == 1 else host  # which gRPC would resolve by itself
                value = f"{host}:{self.cluster.grpc_port}"
            elif name.endswith("_THREADS"):
                value = "1"  # of few cores, which others need
            elif name == "HYBRIDSD_CLOUD_DEVICE":
                value = "cpu"  # there may be no GPU
            elif name == "HYBRIDSD_CLOUD_HOST":
                value = self.address  # each pod has an address, and all the same port
            found[name] = self._here(value)
        if "HYBRIDSD_CLOUD_INSECURE" in found:  # nobody else's business; with TLS and tokens it is as it will be
            found["HYBRIDSD_CLOUD_METRICS_HOST"] = self.address
        if "HYBRIDSD_EDGE_OPEN" in found:
            found["HYBRIDSD_EDGE_HOST"] = self.address
        names = " ".join(f"{name}={','.join(addresses)}" for name, addresses in self.cluster.names.items())
        site = os.pathsep.join([str(self.cluster.folder / "site"), ENVIRONMENT.get("PYTHONPATH", "")])
        return {
            **{name: value for name, value in ENVIRONMENT.items() if not name.startswith("HYBRIDSD_")},
            "HOME": str(self.places.get("/home/hybridsd", self.folder)),
            "PYTHONPATH": site,
            "TEST_NAMES": names,
            **found,
        }

    def start(self) -> None:
        """Starts it."""
        program, *words = self.workload.command
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [BIN / program, *map(self._here, words)], stdout=stream, stderr=stream, env=self.environment(),
                cwd=self.folder,
            )  # fmt: skip

    def url(self, port: str, scheme: str = "http") -> str:
        """Returns where a named port is."""
        return f"{scheme.lower()}://{self.address}:{self.ports[port]}"

    def probe(self, name: str) -> bool:
        """Asks as the kubelet does: a command inside, or GET at the pod's address, with any certificate."""
        probe = self.workload.container[name]
        if "exec" in probe:
            program, *words = probe["exec"]["command"]
            environment = self.environment()
            # Inside a pod 127.0.0.1:50051 is the server; here the pod has an address and a port of its own.
            environment["HYBRIDSD_CLOUD_SERVER"] = f"{self.address}:{self.ports['grpc']}"
            done = subprocess.run(
                [BIN / program, *words], env=environment, capture_output=True, check=False, timeout=HANG_S
            )
            return done.returncode == 0
        http = probe["httpGet"]
        url = self.url(http["port"], http.get("scheme", "HTTP")) + http["path"]
        headers = {each["name"]: each["value"] for each in http.get("httpHeaders", ())}
        try:
            with httpx.Client(verify=False, trust_env=False, timeout=probe["timeoutSeconds"]) as client:
                return 200 <= client.get(url, headers=headers).status_code < 400
        except httpx.HTTPError:
            return False

    def wait_until_ready(self) -> None:
        """Waits for the startup probe, then asks the others."""
        give_up_at = time.monotonic() + HANG_S
        while not self.probe("startupProbe"):
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            assert time.monotonic() < give_up_at, self.log.read_text(encoding="utf-8")
            time.sleep(0.3)
        for name in ("readinessProbe", "livenessProbe"):
            assert self.probe(name), (name, self.log.read_text(encoding="utf-8"))

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.process.send_signal(signal.SIGTERM)


def trust(pems: Iterable[bytes]) -> ssl.SSLContext:
    """Returns a context that trusts these certificates alone."""
    return ssl.create_default_context(cadata="".join(pem.decode() for pem in pems))
