"""What the engine's threads tell of their work as spans, when it is done: nothing where nobody records them."""

import time
from collections.abc import Sequence

from cloud_server.engine.executor import Call
from hybridsd import tracing


def tell_calls(calls: Sequence[Call]) -> None:
    """Tells of one call of the U-Net: one span, however many jobs took part; each is a parent or a link.

    The first job is the parent, so that a job alone has its calls in its own trace. A call that failed for a batch and
    was made again for each job is one span for each.
    """
    if not tracing.is_on() or not calls:
        return
    now_ns = time.time_ns()
    for call in calls:
        if call.job.num_calls == 0 and call.job.first_call_s is not None:  # up to here it waited
            queue = tracing.start("queue", call.job.trace, start_ns=tracing.wall_ns(call.job.arrived_s))
            queue.end(tracing.wall_ns(call.job.first_call_s))
    is_whole = len({call.elapsed_s for call in calls}) == 1
    for batch in [calls] if is_whole else [[call] for call in calls]:
        traces = [call.job.trace for call in batch]
        parent = next((trace for trace in traces if trace.is_sampled), traces[0])
        span = tracing.start(
            "unet call", parent, links=[trace for trace in traces if trace is not parent],
            start_ns=now_ns - int(1e9 * batch[0].elapsed_s),
            attributes={
                "hybridsd.model": batch[0].trajectory.group[0],
                "hybridsd.batch_size": len(batch),
                "hybridsd.rows": sum(call.trajectory.num_rows for call in batch),
                "hybridsd.call": batch[0].trajectory.call,
            },
        )  # fmt: skip
        failed = [call.outcome for call in batch if isinstance(call.outcome, Exception)]
        if failed:
            span.fail(type(failed[0]).__name__)
        span.end(now_ns)
