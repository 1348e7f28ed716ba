"""Ray Serve on this machine as a process of its own: started small, told how to scale, ended.

Run as a script, it is that process: it takes its options as JSON, and how to scale as lines on its standard input.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.run_demo import ENVIRONMENT, ROOT
from hybridsd import certificates
from tests.support.web_processes import free_port

CONFIG = ROOT / "deploy/ray/serve_config.yaml"
STEPS_PER_REPLICA = 100
OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes."""


@dataclass(slots=True)
class RayCloud:
    """A running one. Its ingress and its replicas speak TLS, with one certificate."""

    port: int
    certificate: Path
    log: Path
    process: subprocess.Popen[str]

    def scale(self, min_replicas: int, max_replicas: int) -> None:
        """Says how many replicas there may be; returns when Ray knows."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{min_replicas} {max_replicas}\n")
        self.process.stdin.flush()
        self._wait("scaled")

    def _wait(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise RuntimeError(f"Ray ended; its log:\n{self.log.read_text()[-5000:]}")


@contextmanager
def running_ray_cloud(words: Sequence[str], folder: Path) -> Iterator[RayCloud]:
    """Runs a Ray of its own with two replicas that serve with these options of `hybridsd-cloud serve`."""
    port, log, tls = free_port(), folder / "ray.log", folder / "tls"
    short = tempfile.mkdtemp(prefix="r", dir="/tmp")  # the names of its sockets are its folder's, and may be 107 long
    options = {"port": port, "options": " ".join(words), "folder": short}
    lines = [line for line in (ROOT / "deploy/ray/node.env").read_text().splitlines() if not line.startswith("#")]
    environment = {
        **ENVIRONMENT, **dict(line.split("=", 1) for line in lines), "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1",
        "HYBRIDSD_CLOUD_TLS_DIR": str(tls),
    }  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_cloud", json.dumps(options)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=stream, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
    cloud = RayCloud(port, tls / certificates.FILE, log, process)
    try:
        cloud._wait("scaled")
        yield cloud
    finally:
        process.communicate()  # the end of its input ends it
        shutil.rmtree(short, ignore_errors=True)


def _config(port: int, words: str) -> dict[str, Any]:
    """Returns the configuration that is in the tree, with another port, other models, and as fast as can be."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["grpc_options"]["port"], config["http_options"]["port"] = port, free_port()
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    application["args"]["options"] = words
    deployment["ray_actor_options"]["num_cpus"] = 0.5
    deployment["autoscaling_config"] |= {
        "min_replicas": 2, "max_replicas": 2, "upscale_delay_s": 0, "downscale_delay_s": 3, "metrics_interval_s": 0.5,
        "look_back_period_s": 1,
    }  # fmt: skip
    deployment["autoscaling_config"]["policy"]["policy_kwargs"]["steps_per_replica"] = STEPS_PER_REPLICA
    return config


def _main(*, port: int, options: str, folder: str) -> None:
    import ray
    from ray import serve
    from ray.serve._private import api
    from ray.serve.schema import ServeDeploySchema

    said = os.dup(1)  # Ray writes what its processes say to the standard output
    os.dup2(2, 1)
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=folder,
        namespace="serve", configure_logging=False,
    )  # fmt: skip
    try:
        plain = _config(port, options)
        config = ServeDeploySchema.model_validate(plain)
        client = api.serve_start(
            http_options=config.http_options.model_dump(), grpc_options=config.grpc_options.model_dump()
        )
        client.deploy_apps(config)
        while not _is_running(serve.status()):
            time.sleep(0.1)
        os.write(said, b"scaled\n")
        for line in sys.stdin:
            scaling = plain["applications"][0]["deployments"][0]["autoscaling_config"]
            scaling["min_replicas"], scaling["max_replicas"] = map(int, line.split())
            client.deploy_apps(ServeDeploySchema.model_validate(plain))
            os.write(said, b"scaled\n")
    finally:
        ray.shutdown()


def _is_running(status: Any) -> bool:
    """Whether all replicas are there; raises RuntimeError where they will not be."""
    applications = list(status.applications.values())
    if broken := [one.message for one in applications if one.status == "DEPLOY_FAILED"]:
        raise RuntimeError(broken[0])
    return bool(applications) and all(one.status == "RUNNING" for one in applications)


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
