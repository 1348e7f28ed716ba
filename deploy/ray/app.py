"""The cloud as a Ray Serve application: each replica is a whole server, as `hybridsd-cloud serve` is one.

Ray places replicas, watches them, and decides how many there are; `ingress.py` brings calls to them. See docs/ray.md.
"""

import asyncio
import random
import shlex
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cloud_server import cli, preflight
from cloud_server.engine.caller import Caller
from cloud_server.settings import Settings, address, is_loopback
from hybridsd import certificates, tracing

NAME = "Cloud"
MAX_STREAMS = 100_000
"""Of a replica, as far as Ray is concerned: the engine has limits of its own, and says so with a reason."""
DRAIN_S, CHECK_S = 120.0, 2.0
"""For the streams of a replica that is to end; and how often Ray asks how one is."""
ROUTER = {"request_router_class": "deploy.ray.app:StickyRouter", "request_routing_stats_period_s": 1.0}
_OPERATOR = Caller(principal="ray", is_admin=True)


class StickyRouter(RequestRouter):
    """Chooses the replica that has the job of a call, else of two the one with fewer streams.

    Not first in, first out: Ray's mixin for that may give a call the replica that was found for another.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See Ray. The arguments of a call are the id of its job, and the replicas that did not take it."""
        request_id, refused = ("", ()) if pending_request is None else pending_request.args
        willing = [one for one in candidate_replicas if one.replica_id.unique_id not in refused] or candidate_replicas
        holders = [one for one in willing if request_id and request_id in one.routing_stats.get("jobs", ())]
        return [holders, random.sample(willing, min(2, len(willing)))]


class StepsPolicy:
    """Wants so many replicas that each has this many steps to take.

    Args:
        steps_per_replica: What a replica takes in the time that a new job may wait.
    """

    def __init__(self, steps_per_replica: float) -> None:
        self._steps_per_replica = steps_per_replica

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Returns how many; Ray applies bounds, factors and delays."""
        steps = (context.aggregated_metrics or {}).get("steps", {})
        return sum(steps.values()) / self._steps_per_replica, {}


@serve.deployment(
    name=NAME, max_ongoing_requests=MAX_STREAMS, graceful_shutdown_timeout_s=DRAIN_S, health_check_period_s=CHECK_S,
    request_router_config=ROUTER,
)  # fmt: skip
class Cloud:
    """A server of the models, for as long as Ray wants this replica.

    Args:
        options: Of `hybridsd-cloud serve`, as on its command line; HYBRIDSD_CLOUD_* variables count as well.
    """

    async def __init__(self, options: str) -> None:
        from cloud_server.rpc.server import CloudServer  # torch: only replicas need it

        settings = inner_settings(cli.read_options(shlex.split(options)), ray.util.get_node_ip_address())
        tracing.switch_on("hybridsd-cloud", settings.traces)
        loaded = await asyncio.to_thread(cli.load, settings)
        self._settings, self._server = settings, CloudServer(**loaded)
        await self._server.start()

    def record_replica_metadata(self) -> dict[str, str]:
        """Returns where the server of this replica listens, and the certificate that it shows; empty for none."""
        cert = self._settings.tls_cert
        shown = "" if cert is None else certificates.certificate_only(cert.read_bytes())
        return {"address": address(self._settings.host, self._server.port), "certificate": shown}

    def record_routing_stats(self) -> dict[str, list[str]]:
        """Returns the ids of the jobs that are here: other calls with them are to come here."""
        return {"jobs": [job.request_id for job in self._server.engine.jobs(_OPERATOR)]}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns how many steps the jobs that are here have still to take."""
        return {"steps": float(sum(job.num_calls_left for job in self._server.engine.jobs(_OPERATOR)))}

    def check_health(self) -> None:
        """Raises RuntimeError where only another process can help: Ray starts one."""
        if self._server.lost.is_set():
            raise RuntimeError("the engine has died or is stuck; see the log")

    async def __del__(self) -> None:
        """Ends the server. Ray has waited for its streams by then."""
        if server := getattr(self, "_server", None):
            await server.stop(self._settings.drain_timeout_s)
        tracing.switch_off()


def inner_settings(settings: Settings, node: str) -> Settings:
    """Returns the settings of a replica's own server: on any port, at its node if others come, with its own TLS."""
    host = settings.host if is_loopback(settings.host) else node
    own = {"tls_cert": None, "tls_key": None, "tls_client_ca": None, "tls_names": (), "insecure": False}
    return preflight.provide_certificate(replace(settings, host=host, port=0, port_file=None, **own))


def build(args: dict[str, str]) -> serve.Application:
    """Returns the application of a Serve configuration, whose `args` are those of `Cloud`."""
    return Cloud.bind(args["options"])
