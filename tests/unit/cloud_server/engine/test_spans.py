"""What the engine tells of its calls: one span for a batch, linked to all its jobs."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.models.load import Model
from hybridsd import trace_context, tracing
from tests.support.engine_fakes import (
    FailingDenoiser,
    GatedDenoiser,
    bad_embeds,
    job_request,
    read_to_end,
    read_to_start,
)

MakeEngine = Callable[..., Engine]


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.install(SimpleSpanProcessor(exporter), "tests")
    yield exporter
    tracing.switch_off()


async def test_a_batch_is_one_span_with_links_to_its_jobs(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser, exporter: InMemorySpanExporter
) -> None:
    """The first sampled job is the parent, the others are links; a lone call before them is the first job's."""
    engine = make_engine({"tiny": gated})
    contexts = [trace_context.parse([f"00-{index + 1:032x}-{index + 1:016x}-01"]) for index in range(3)]
    buffers = [EventBuffer() for _ in contexts]
    for index, (context, buffer) in enumerate(zip(contexts, buffers, strict=True)):
        with trace_context.bound(context):
            engine.submit(job_request(tiny_model, handoff_call=2), buffer)
        if index == 0:
            await asyncio.to_thread(gated.entered.acquire)  # its first call runs alone
    for buffer in buffers[1:]:
        await read_to_start(buffer)
    gated.open()
    for buffer in buffers:
        await read_to_end(buffer)
    calls = [span for span in exporter.get_finished_spans() if span.name == "unet call"]
    sizes = [dict(span.attributes or {})["hybridsd.batch_size"] for span in calls]

    assert len(calls) == len(gated.rows)
    assert sum(sizes) == 6
    assert max(sizes) > 1
    for span, size in zip(calls, sizes, strict=True):
        assert span.parent is not None
        traces = {span.parent.trace_id, *(link.context.trace_id for link in span.links)}
        assert len(traces) == size
    queues = [span for span in exporter.get_finished_spans() if span.name == "queue"]
    assert sorted(span.context.trace_id for span in queues) == [1, 2, 3]


async def test_a_failed_call_says_by_which_exception(
    tiny_model: Model, make_engine: MakeEngine, exporter: InMemorySpanExporter
) -> None:
    engine = make_engine({"tiny": FailingDenoiser(tiny_model.denoiser, error=ValueError("a secret"))})
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model, prompt=bad_embeds(), negative_prompt=bad_embeds()), buffer)
    await read_to_end(buffer)
    (call,) = [span for span in exporter.get_finished_spans() if span.name == "unet call"]

    assert dict(call.attributes or {})["error.type"] == "ValueError"
    assert "secret" not in call.to_json()
