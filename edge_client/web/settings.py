"""How the gateway serves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridsd.tokens import Tokens

LEASE_S = 15.0
"""See `Settings.lease_s`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a gateway serves."""

    data_dir: Path
    """Folder of the jobs and their images."""
    database: str | None = None
    """Address of Postgres, which several replicas share; None: SQLite in the folder."""
    images: str | Path | None = None
    """Folder or address of the images; None: the folder."""
    lease_s: float = LEASE_S
    """How long a replica may be silent before another runs its jobs."""
    tokens: Tokens | None = None
    """Tokens that are accepted; None: no token is needed."""
    hosts: Sequence[str] = ("*",)
    """Accepted Host names. Others are refused, which prevents DNS rebinding."""
    any_address: bool = False
    """Whether any IP address is accepted as a Host: those cannot be rebound."""
    cors_origins: Sequence[str] = ()
    """Other sites whose pages may use the gateway."""
    webhook_hosts: Sequence[str] = ()
    """Hosts that webhooks may call."""
    workers: int = 2
    """Jobs that run at once."""
    max_queue: int = 256
    """Limit of waiting jobs."""
    max_jobs: int = 1000
    """Limit of finished jobs; beyond it the oldest of whoever has most is deleted."""
    max_data_bytes: int = 10 << 30
    """Limit of the images of finished jobs, likewise."""
    fit_size: bool = False
    """Whether images may have sizes that the models lack: they draw the nearest, which is resized."""
    max_body_bytes: int = 32 << 20
    cloud_dollars_per_hour: float | None = None
    """What the cloud costs while it computes; the page says it for each split. None: not known."""
