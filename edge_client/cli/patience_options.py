"""The options that say how long the cloud is waited for."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from edge_client.cli.shared_options import NumberRange
from edge_client.request import Patience
from hybridsd.limits import MAX_DEADLINE_S

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {
    "idle_timeout": "Without any message of the cloud for so long, not even a heartbeat, it is left.",
    "progress_timeout": "Without a new state of the cloud for so long, for each call of its U-Net, it is left.",
    "queue_timeout": "So long a job may wait in the cloud's queue.",
    "busy_timeout": "So long a cloud that is full is asked again, as often as it says.",
    "reattach_timeout": "So long a cloud is tried again after a stream of it broke.",
    "silence_memory": "So long a cloud that was silent is not asked.",
}
"""By the fields of `Patience`, without their unit."""


def patience_options(command: F) -> F:
    """Adds an option for each field of `Patience`."""
    for name, what in reversed(_OPTIONS.items()):
        is_open = name != "silence_memory"
        command = click.option(
            f"--{name.replace('_', '-')}", type=NumberRange(0, MAX_DEADLINE_S, min_open=is_open), help=what,
            default=getattr(Patience(), f"{name}_s"), show_default=True, metavar="SECONDS",
        )(command)  # fmt: skip
    return command


def read_patience(options: Mapping[str, Any]) -> Patience:
    """Returns what the options say."""
    return Patience(**{f"{name}_s": options[name] for name in _OPTIONS})
