"""How gRPC is to treat the connections of a server of ours."""

from hybridsd.limits import MAX_REQUEST_BYTES

MAX_RECEIVED_BYTES = 2 * MAX_REQUEST_BYTES
"""Beyond this gRPC itself refuses, before we can say why."""
OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a riddle
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    ("grpc.keepalive_time_ms", 10_000),  # a caller that vanished holds its place until a ping is not answered
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, whatever the line before says
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),  # a caller that does not begin holds a socket; else two minutes
]
