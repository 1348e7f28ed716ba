"""Spans of time on the wire: seconds as a float here, `google.protobuf.Duration` there."""

from google.protobuf.duration_pb2 import Duration


def to_duration(seconds: float) -> Duration:
    """Returns a span of time, to the microsecond."""
    micros = round(seconds * 1e6)
    return Duration(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1000)


def to_seconds(duration: Duration) -> float:
    """Returns a span of time in seconds."""
    return duration.seconds + duration.nanos / 1e9
