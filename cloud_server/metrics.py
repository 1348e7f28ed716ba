"""What a server counts, for Prometheus: docs/observability.md lists it. In base units; never prompts, users or secrets.

Each server has its own registry. Every label is one of a set that the operator or this code bounds.
"""

import contextlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import NamedTuple, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybridsd.labels import BoundedLabel
from hybridsd.tokens import Tokens

MAX_MODELS = 64
MAX_TOKENS = 64
"""Names of tokens that are told apart, of all that ever called."""
NO_TOKEN = "none"
OUTCOMES = ("completed", "cancelled", "late", "unavailable", "failed")

WAIT_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300)
STEP_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
CALL_S = (0.001, 0.003, 0.006, 0.01, 0.03, 0.1, 0.3, 0.6, 1, 3, 10, 30, 60, 120, 300)
"""Of calls: a part of what gRFC A66 advises, which is for calls of microseconds, and beyond: a job is one call."""
LOAD_S = (0.3, 1, 3, 10, 20, 30, 60, 120, 300, 600, 1800)
CALL_BYTES = (0, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)

M = TypeVar("M", Counter, Gauge, Histogram)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # which would double the number of series, for nobody who asks


class LoadedModel(NamedTuple):
    """A model on a device."""

    id: str
    latent_space: str
    device: str
    dtype: str | None
    """None where it is not loaded."""


class Metrics:
    """The metrics of one server. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # What a server is and how it is; a server tells with `watch`.
        self.model_load = self._histogram("model_load_seconds", "Loading a model onto a device.", LOAD_S)
        self.evictions = self._make(Counter, "model_evictions", "Models that made room for others.")
        # Jobs.
        self.jobs = self._make(
            Counter, "jobs", "Jobs that have ended: completed, cancelled, late, unavailable (the server stopped or was"
            " stuck) or failed.", "outcome",
        )  # fmt: skip
        self.refusals = self._make(
            Counter, "refusals", "Calls that ended with an error before a job was there, by the reasons of"
            " docs/protocol.md.", "reason",
        )  # fmt: skip
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "From the arrival of a job to its first step, or to its end without one.", WAIT_S
        )
        self.first_state = self._histogram(
            "first_state_seconds", "From the arrival of a job to its first state.", WAIT_S
        )
        self.text = self._histogram("text_seconds", "Encoding the texts of a job, where they were not held.", WAIT_S)
        # Steps.
        self.step = self._histogram("step_seconds", "A call of the U-Net, for a whole batch.", STEP_S, "model")
        self.batch = self._histogram("batch_jobs", "Jobs in a call of the U-Net.", BATCH)
        self.steps = self._make(Counter, "steps", "Calls of the U-Net, counted for each job of a batch.", "model")
        # Streams.
        self.sent_bytes = self._make(Counter, "sent_bytes", "Bytes of the messages of streams, by codec.", "codec")
        self.states_dropped = self._make(Counter, "states_dropped", "States that a slow reader did not get.")
        self.cache_requests = self._make(
            Counter, "cache_requests", "Texts, plans, states (prefixes) and those of near texts (near) that were asked"
            " for: hit, miss, or part: a state before the one that was asked for.", "cache", "result",
        )  # fmt: skip
        self.reused_steps = self._make(
            Counter, "reused_steps", "Calls of the U-Net that were not run, for their outcome was kept."
        )
        # Tokens.
        self.token_jobs = self._make(
            Counter, "token_jobs", f"Jobs by name of the token; {NO_TOKEN} without one, other beyond {MAX_TOKENS}.",
            "token",
        )  # fmt: skip
        self.token_steps = self._make(Counter, "token_steps", "Steps, likewise.", "token")
        # gRPC's own names: gRFC A66, as OpenTelemetry writes them for Prometheus.
        self.calls_started = Counter(
            "grpc_server_call_started", "Calls that came; a method that is not served is other.", ("grpc_method",),
            registry=self.registry,
        )  # fmt: skip
        self.call_duration = self._grpc("duration_seconds", "From a call's arrival to its status.", CALL_S)
        self.call_sent = self._grpc(
            "sent_total_compressed_message_size_bytes", "Bytes of the messages sent in a call.", CALL_BYTES
        )
        self.call_received = self._grpc(
            "rcvd_total_compressed_message_size_bytes", "Bytes of the messages received in a call.", CALL_BYTES
        )
        self._model_label, self._token_label = BoundedLabel(MAX_MODELS), BoundedLabel(MAX_TOKENS)
        for outcome in OUTCOMES:  # from 0 on, or the first of a kind would be no increase
            self.jobs.labels(outcome)
        found = itertools.product(("texts", "plans", "prefixes", "near"), ("hit", "miss"))
        for cache, result in [*found, ("prefixes", "part")]:
            self.cache_requests.labels(cache, result)
        build = self._make(Gauge, "build_info", "1; the label says the version.", "version")
        build.labels(importlib.metadata.version("hybridsd")).set(1)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read when it is asked for."""
        self._make(Gauge, name, documentation).set_function(read)

    def watch_count(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Adds a counter that is read when it is asked for; what it counts never gets less."""
        self.registry.register(
            _Read(lambda: [CounterMetricFamily(f"hybridsd_cloud_{name}", documentation, value=read())])
        )

    def watch_models(self, read: Callable[[], Iterable["LoadedModel"]]) -> None:
        """Adds which models are loaded."""

        def families() -> Iterable[Metric]:
            info = GaugeMetricFamily(
                "hybridsd_cloud_model_info", "1 for each model that is loaded.",
                labels=["model", "latent_space", "device", "dtype"],
            )  # fmt: skip
            loaded = GaugeMetricFamily(
                "hybridsd_cloud_model_loaded", "Whether a model that is known is loaded on a device: 1 or 0.",
                labels=["model", "device"],
            )  # fmt: skip
            for model in itertools.islice(read(), MAX_MODELS):
                if model.dtype is not None:
                    info.add_metric([model.id, model.latent_space, model.device, model.dtype], 1)
                loaded.add_metric([model.id, model.device], 0 if model.dtype is None else 1)
            return info, loaded

        self.registry.register(_Read(families))

    def watch_memory(self, read: Callable[[], Iterable[tuple[str, int, int | None]]]) -> None:
        """Adds what models take of each device, by its name: bytes, and how many they may take."""

        def families() -> Iterable[Metric]:
            used = GaugeMetricFamily(
                "hybridsd_cloud_model_bytes", "What the weights of models take of a device.", labels=["device"]
            )
            budget = GaugeMetricFamily(
                "hybridsd_cloud_model_budget_bytes", "What they may take (--memory-budget); infinite without a limit.",
                labels=["device"],
            )  # fmt: skip
            for device, used_bytes, budget_bytes in read():
                used.add_metric([device], used_bytes)
                budget.add_metric([device], math.inf if budget_bytes is None else budget_bytes)
            return used, budget

        self.registry.register(_Read(families))

    def watch_certificate(self, read: Callable[[], datetime]) -> None:
        """Adds when the certificate expires, by a function that reads it."""

        def family() -> Iterable[Metric]:
            gauge = GaugeMetricFamily(
                "hybridsd_cloud_certificate_expiry_timestamp_seconds", "When the certificate expires."
            )
            with contextlib.suppress(OSError, ValueError):  # being replaced, or broken: the log says so
                gauge.add_metric([], read().timestamp())
            yield gauge

        self.registry.register(_Read(family))

    def watch_tokens(self, tokens: Tokens) -> None:
        """Adds when tokens expire."""
        self.registry.register(_Read(lambda: [_expiries(tokens)]))

    def note_call(self, model: str, num_jobs: int, elapsed_s: float) -> None:
        """Counts a call of the U-Net."""
        label = self._model_label(model)
        self.step.labels(label).observe(elapsed_s)
        self.batch.observe(num_jobs)
        self.steps.labels(label).inc(num_jobs)

    def note_job(
        self, *, outcome: str, token: str, queue_s: float, text_s: float, first_state_s: float | None, num_calls: int
    ) -> None:
        """Counts a job that has ended.

        Args:
            outcome: See `jobs`.
            token: Name of the caller's token; empty for none.
            queue_s: See `queue_wait`.
            text_s: See `text`; 0 where nothing was encoded.
            first_state_s: See `first_state`; None where none came.
            num_calls: Of the U-Net.
        """
        self.jobs.labels(outcome).inc()
        self.queue_wait.observe(queue_s)
        if text_s > 0:
            self.text.observe(text_s)
        if first_state_s is not None:
            self.first_state.observe(first_state_s)
        label = self._token_label(token) if token else NO_TOKEN
        self.token_jobs.labels(label).inc()
        self.token_steps.labels(label).inc(num_calls)

    def note_lookup(self, cache: str, *, is_hit: bool) -> None:
        """Counts a request to a cache: texts, plans or near."""
        self.cache_requests.labels(cache, "hit" if is_hit else "miss").inc()

    def note_prefix(self, num_reused: int, num_asked: int) -> None:
        """Counts a request to the prefix cache: of the calls that were asked for, how many need not be run."""
        result = "hit" if num_reused == num_asked else "part" if num_reused else "miss"
        self.cache_requests.labels("prefixes", result).inc()
        self.reused_steps.inc(num_reused)

    def _make(self, kind: type[M], name: str, documentation: str, *labels: str) -> M:
        return kind(f"hybridsd_cloud_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"hybridsd_cloud_{name}", documentation, labels, buckets=buckets, registry=self.registry)

    def _grpc(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        labels = ("grpc_method", "grpc_status")
        return Histogram(f"grpc_server_call_{name}", documentation, labels, buckets=buckets, registry=self.registry)


class _Read(Collector):
    """Families that are made when they are asked for."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield from self._read()


def _expiries(tokens: Tokens) -> Metric:
    family = GaugeMetricFamily(
        "hybridsd_cloud_token_expiry_timestamp_seconds", "When a token expires; none of tokens that do not.",
        labels=["token"],
    )  # fmt: skip
    for token in [token for token in tokens.all if token.expires is not None][:MAX_TOKENS]:
        family.add_metric([token.name], token.expires.timestamp() if token.expires else 0.0)
    return family
