"""Where and how the server runs: one value, built in `cli.py` from flags and HYBRIDSD_CLOUD_* variables.

Knows nothing of models; reads nothing by itself.
"""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from hybridsd.certificates import check_name
from hybridsd.tokens import Tokens
from hybridsd.tracing import Exporter

MAX_HEARTBEAT_S = 10.0
"""Half the silence after which an edge goes on alone."""

MAX_WAIT_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """See the help of `hybridsd-cloud serve`."""

    models: tuple[str, ...]
    """`[id=]path` or `[id=]hub_id`, the default first."""
    variant: str | None = None
    configs: tuple[str, ...] = ()
    """`[id=]folder_or_hub_id`, with what a model lacks."""
    loras: tuple[str, ...] = ()
    """`[model:]name=path`."""
    device: str = "auto"
    """As `devices.place_all` takes it: one worker for each."""
    dtype: str = "auto"
    memory_budget: float | None = None
    """GiB of each device that models may take; None: all."""
    load_nice: int = 19
    """Of the process that loads a model beside steps."""
    latent_space: str | None = None
    threads: int | None = None
    """Of a call on a CPU; None divides what torch chooses among its workers."""
    host: str = "127.0.0.1"
    port: int = 50051
    port_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_dir: Path | None = None
    """Folder of a certificate that is made here, where TLS is used and none is given; None is the default one."""
    tls_names: tuple[str, ...] = ()
    """That it is for, beside those of this machine."""
    tls_client_ca: Path | None = None
    """Authorities of the certificates that callers must have; None asks for none."""
    insecure: bool = False
    """Plain text, also beyond this machine."""
    tokens: Tokens | None = None
    """Of which callers must send one; None: everybody may call."""
    max_batch: int = 8
    max_queue: int = 32
    prefix_cache_mib: int = 0
    """What states that are kept to answer later jobs may take; 0 keeps none."""
    max_size: int | None = None
    """Pixels; None is twice the largest default size of the models."""
    bundles: tuple[Path, ...] = ()
    metrics_port: int | None = None
    """Of /healthz, /readyz and /metrics; 0 is any free one, None is none."""
    metrics_host: str = "127.0.0.1"
    drain_timeout_s: float = 30.0
    heartbeat_s: float = 5.0
    traces: Exporter = "none"
    joules_per_mac: float | None = None
    """None is the constant of the device's class."""
    watts: float | None = None
    """Of the device under load; given, energy is modelled by it."""
    stall_timeout_s: float = 60.0
    """Work without movement for this long is sickness; larger than a slow step."""
    stall_exit_s: float = 300.0
    """And for this long the end of the process."""

    def __post_init__(self) -> None:
        for name in ("drain_timeout", "heartbeat", "stall_timeout", "stall_exit"):
            seconds = getattr(self, f"{name}_s")
            if not seconds <= MAX_WAIT_S:  # not a number is no time either
                raise ValueError(f"--{name.replace('_', '-')} is {seconds:g} s; choose at most {MAX_WAIT_S:g}")
        if self.heartbeat_s > MAX_HEARTBEAT_S:
            raise ValueError(
                f"--heartbeat is {self.heartbeat_s:g} s; choose at most {MAX_HEARTBEAT_S:g}: edges take longer silence"
                " for a dead server"
            )
        if self.stall_exit_s < self.stall_timeout_s:
            raise ValueError(
                f"--stall-exit is {self.stall_exit_s:g} s; choose at least --stall-timeout, {self.stall_timeout_s:g} s"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together; give both or none")
        for name in self.tls_names:
            try:
                check_name(name)
            except ValueError as error:
                raise ValueError(f"--tls-name {error}") from error
        if self.tls_client_ca is not None and not self.uses_tls:
            raise ValueError("--tls-client-ca needs TLS; leave --insecure out")
        if not is_loopback(self.metrics_host):
            if self.metrics_port is None:
                raise ValueError(f"--metrics-host is {self.metrics_host} without --metrics-port; give a port, as 9464")
            if not (self.uses_tls or self.insecure):
                raise ValueError(
                    f"--metrics-host {self.metrics_host} can be reached from elsewhere, and tokens would come there in"
                    " plain text; give --tls-name with the name of this machine to speak TLS, or --insecure"
                )

    @property
    def uses_tls(self) -> bool:
        """Whether callers speak TLS: where it is asked for, and beyond this machine unless it is declined."""
        if self.tls_cert is not None:
            return True
        asked = self.tls_dir is not None or bool(self.tls_names) or self.tls_client_ca is not None
        return not self.insecure and (asked or not is_loopback(self.host))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    """Returns host and port as gRPC takes them, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
