"""A tiny model, loaded once, and servers on a free port of the loopback."""

from tests.support.cloud_fixtures import (  # noqa: F401
    _default_logging,
    _one_thread,
    gated,
    log_lines,
    make_engine,
    start_server,
    tiny_folder,
    tiny_model,
)
