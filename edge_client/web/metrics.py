"""What a gateway counts, for Prometheus (docs/observability.md). In base units; never prompts, users or secrets.

Each gateway has its own registry. Every label is one of a set that the operator or this code bounds.
"""

import contextlib
import importlib.metadata
import itertools
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_client.cache import Cache
from edge_client.generation.events import EarlyHandoff, Event, Failover, Fallback, Finished, Retrying, StepDone
from hybridsd.errors import Reason
from hybridsd.labels import OTHER, BoundedLabel
from hybridsd.tokens import Tokens

MAX_TOKENS = 64
"""Names of tokens that are told apart, of all that ever called."""
OUTCOMES, MODES = ("completed", "failed", "cancelled"), ("auto", "hybrid", "cloud", "edge")
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})

WAIT_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)
STEP_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
STEPS = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50, 100)
REQUEST_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300)

M = TypeVar("M", Counter, Gauge, Histogram)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # which would double the number of series


class Metrics:
    """The metrics of one gateway. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = self._make(Gauge, "build_info", "1; the label says the version.", "version")
        build.labels(importlib.metadata.version("hybridsd")).set(1)
        # How it is: set when it is asked for.
        self.ready = self._make(Gauge, "ready", "1 while jobs are taken and get on.")
        self.database_up = self._make(Gauge, "database_up", "1 where the database of the jobs answers.")
        self.queue_length = self._make(Gauge, "queue_length", "Jobs that wait, at all replicas of the gateway.")
        self.queue_limit = self._make(Gauge, "queue_limit", "Jobs that may wait, the operator's --max-queue.")
        self.jobs_running = self._make(Gauge, "jobs_running", "Jobs that run here.")
        self.event_streams = self._make(Gauge, "event_streams", "Streams of events that are open.")
        self.disk_used = self._make(Gauge, "disk_used_bytes", "Of images that are kept, finished and given.")
        self.disk_limit = self._make(
            Gauge, "disk_limit_bytes", "What finished images may take, the operator's --max-data-mib."
        )
        self.disk_free = self._make(Gauge, "disk_free_bytes", "Left on the disk of the images; NaN where nobody knows.")
        self.cloud_up = self._make(Gauge, "cloud_up", "1 where a cloud answered when it was last asked.", "target")
        self.cloud_silent = self._make(
            Gauge,
            "cloud_silent",
            "1 while a cloud that was silent is left alone, the operator's --silence-memory.",
            "target",
        )
        # Jobs.
        self.jobs = self._make(
            Counter, "jobs", "Jobs that have ended: completed, failed or cancelled; by the mode that was asked for.",
            "outcome", "mode",
        )  # fmt: skip
        self.queue_wait = self._histogram("queue_wait_seconds", "From a job's arrival to its first attempt.", WAIT_S)
        self.refusals = self._make(
            Counter, "refusals", "Requests that were answered with an error, by the reasons of docs/protocol.md.",
            "reason",
        )  # fmt: skip
        # Images.
        self.images = self._make(Counter, "images", "Finished images, by what happened: hybrid, cloud or edge.", "mode")
        self.steps = self._make(Counter, "steps", "Steps of finished images, by place: cloud or edge.", "place")
        self.step = self._histogram("step_seconds", "A call of the U-Net on this device.", STEP_S)
        self.decode = self._histogram("decode_seconds", "Decoding an image on this device.", STEP_S)
        self.handoff = self._histogram(
            "handoff_step", "The step at which this device went on, of images that a cloud began.", STEPS
        )
        self.takeovers = self._make(
            Counter, "takeovers", "Images whose cloud was lost, late or full, so that this device took over.", "reason"
        )
        self.untrained_steps = self._make(
            Counter, "untrained_steps", "Steps of finished images that this device drew above the noise level that its"
            " U-Net is trained for, when it took over.",
        )  # fmt: skip
        self.failovers = self._make(
            Counter, "failovers", "Times that a cloud was left, and another asked, by why it was left.", "reason"
        )
        self.early_handoffs = self._make(
            Counter, "early_handoffs", "Images that were taken from the cloud on purpose, by an automatic split."
        )
        self.retries = self._make(Counter, "retries", "Times that a cloud was asked again, by what it said.", "reason")
        self.received_bytes = self._make(
            Counter, "received_bytes", "Bytes of the messages of clouds, of finished images, by codec.", "codec"
        )
        self.embeddings = self._make(
            Counter, "embeddings", "Finished images with steps of a cloud, by where their embeddings are from: edge,"
            " cloud, cache or file; none where none are here.", "source",
        )  # fmt: skip
        # Requests.
        self.requests = self._make(
            Counter, "http_requests", "Requests by route, never by path; other where there is none.", "method", "route",
            "status",
        )  # fmt: skip
        self.request_duration = self._histogram(
            "http_request_duration_seconds", "From a request's head to the end of its answer.", REQUEST_S, "route"
        )
        # Tokens.
        self.token_jobs = self._make(
            Counter, "token_jobs", "Jobs by name of the token; none without one, unnamed of a plain list, other beyond"
            f" {MAX_TOKENS}.", "token",
        )  # fmt: skip
        self.token_images = self._make(Counter, "token_images", "Finished images, likewise.", "token")
        for outcome, mode in itertools.product(OUTCOMES, MODES):  # from 0 on, or the first would be no increase
            self.jobs.labels(outcome, mode)
        for reason in (Reason.QUEUE_FULL, Reason.UNAVAILABLE):
            self.takeovers.labels(reason.name)
            self.failovers.labels(reason.name)
            self.retries.labels(reason.name)
        self._token_label = BoundedLabel(MAX_TOKENS)

    def watch_cache(self, cache: Cache) -> None:
        """Adds the requests to the cache of what clouds sent."""

        def read() -> Iterable[Metric]:
            family = CounterMetricFamily(
                "hybridsd_edge_cache_requests", "Embeddings and plans that were asked for: hit or miss.",
                labels=["cache", "result"],
            )  # fmt: skip
            for kind, name in (("conditioning", "embeddings"), ("plan", "plans")):
                for is_hit in (False, True):
                    family.add_metric([name, "hit" if is_hit else "miss"], cache.lookups[kind, is_hit])
            yield family

        self.registry.register(_Read(read))

    def watch_certificate(self, read: Callable[[], datetime]) -> None:
        """Adds when the certificate expires, by a function that reads it."""

        def family() -> Iterable[Metric]:
            gauge = GaugeMetricFamily(
                "hybridsd_edge_certificate_expiry_timestamp_seconds", "When the certificate expires."
            )
            with contextlib.suppress(OSError, ValueError):  # being replaced, or broken: the log says so
                gauge.add_metric([], read().timestamp())
            yield gauge

        self.registry.register(_Read(family))

    def watch_tokens(self, tokens: Tokens) -> None:
        """Adds when tokens expire."""

        def read() -> Iterable[Metric]:
            family = GaugeMetricFamily(
                "hybridsd_edge_token_expiry_timestamp_seconds", "When a token expires; none of tokens that do not.",
                labels=["token"],
            )  # fmt: skip
            for token in [token for token in tokens.all if token.expires is not None][:MAX_TOKENS]:
                family.add_metric([token.name], token.expires.timestamp() if token.expires else 0.0)
            yield family

        self.registry.register(_Read(read))

    def note_event(self, event: Event) -> None:
        """Counts what happens to an image."""
        match event:
            case StepDone(place="edge"):
                self.step.observe(event.elapsed_s)
            case Retrying():
                self.retries.labels(event.reason.name).inc()
            case Failover():
                self.failovers.labels(event.reason.name).inc()
            case Fallback():
                self.takeovers.labels(event.reason.name).inc()
            case EarlyHandoff():
                self.early_handoffs.inc()
            case Finished(result=result):
                cloud_steps = result.actual_cloud_steps - result.earlier_cloud_steps
                self.images.labels(result.mode).inc()
                self.steps.labels("cloud").inc(cloud_steps)
                self.steps.labels("edge").inc(len({done.step for done in result.steps if done.place == "edge"}))
                self.untrained_steps.inc(result.untrained_steps)
                self.decode.observe(result.decode_s)
                if result.planned_cloud_steps:
                    self.handoff.observe(result.first_step + cloud_steps)
                if cloud_steps:
                    self.embeddings.labels(result.embeddings_from or "none").inc()
                if result.received_bytes:
                    self.received_bytes.labels(result.codec).inc(result.received_bytes)

    def note_job(self, *, outcome: str, mode: str, token: str, queue_s: float | None, num_images: int) -> None:
        """Counts a job that has ended.

        Args:
            outcome: See `jobs`.
            mode: That was asked for.
            token: Name of the caller's; see `token_jobs`.
            queue_s: See `queue_wait`; None where it never began.
            num_images: That are finished.
        """
        self.jobs.labels(outcome, mode).inc()
        if queue_s is not None:
            self.queue_wait.observe(queue_s)
        label = self._token_label(token)
        self.token_jobs.labels(label).inc()
        self.token_images.labels(label).inc(num_images)

    def note_request(self, *, method: str, route: str, status: int, reason: str | None, elapsed_s: float) -> None:
        """Counts a request that has been answered.

        Args:
            method: Of HTTP.
            route: Template of the path.
            status: Of the answer.
            reason: Of the error; None for none.
            elapsed_s: See `request_duration`.
        """
        self.requests.labels(method if method in METHODS else OTHER, route, str(status)).inc()
        self.request_duration.labels(route).observe(elapsed_s)
        if reason is not None:
            self.refusals.labels(reason).inc()

    def _make(self, kind: type[M], name: str, documentation: str, *labels: str) -> M:
        return kind(f"hybridsd_edge_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"hybridsd_edge_{name}", documentation, labels, buckets=buckets, registry=self.registry)


class _Read(Collector):
    """Families that are made when they are asked for."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield from self._read()
