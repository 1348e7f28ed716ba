"""The connection: who may be spoken to in plain text, what errors become, what the cache forgets."""

import shutil
import socket
import subprocess
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from edge_client import cache as caches
from edge_client.addresses import is_loopback
from edge_client.bundles import bundle as bundles
from edge_client.bundles.bundle import Bundle
from edge_client.bundles.download import fetch
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.status import translate
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd.errors import AccessDenied, CloudTimeout, CloudUnreachable, InvalidRequest, Reason
from tests.support.fake_cloud import FakeCloud, Running, serve


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("LOCALHOST", True), ("127.0.0.1", True), ("[::ffff:127.0.0.1]", True),
        ("[::ffff:10.0.0.1]", False), ("127.9.9.9", True), ("[::1]", True), ("10.0.0.1", False),
        ("example.org", False), ("localhost.example.org", False), ("127.example.org", False),
    ],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    """Only this machine is this machine."""
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("target", "insecure", "encrypted"),
    [("127.0.0.1:1", False, False), ("10.0.0.1:1", False, True), ("10.0.0.1:1", True, False)],
)
def test_plain_text_stays_here(target: str, insecure: bool, encrypted: bool, tmp_path: Path) -> None:
    """Another machine is spoken to with TLS unless plain text is allowed."""
    with Cloud(target, insecure=insecure, cache=Cache(tmp_path)) as cloud:
        assert cloud.encrypted is encrypted


def test_no_proxy_on_the_way_to_this_machine(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment, here one that is not there, is not asked for this machine."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Cloud(running.target, cache=Cache(tmp_path), connect_timeout_s=2) as cloud:
        assert cloud.capabilities().server_version == "0.1.0"


@pytest.mark.parametrize(
    "target", ["here", ":1", "here:", "here:http", "", "http://127.0.0.1:1", "here:0", "here:65536"]
)
def test_targets_are_checked(target: str, tmp_path: Path) -> None:
    """A server without host or port is refused at once."""
    with pytest.raises(InvalidRequest, match="give host:port"):
        Cloud(target, cache=Cache(tmp_path))


class Failed(grpc.RpcError):
    """A failed call, without details as a proxy makes it, unless it is given a status."""

    status: status_pb2.Status | None = None

    def __init__(self, code: grpc.StatusCode, details: str = "no details") -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return (("grpc-status-details-bin", self.status.SerializeToString()),) if self.status is not None else ()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL),
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.FIELD_INVALID),
        (grpc.StatusCode.UNAUTHENTICATED, Reason.UNAUTHENTICATED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.INTERNAL),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL),
    ],
)
def test_errors_without_details_go_by_code(code: grpc.StatusCode, reason: Reason) -> None:
    """A status from a proxy has no reason of ours; its code says enough."""
    error = translate(Failed(code))

    assert error.reason is reason
    assert type(error) is reason.value.error


def test_server_text_is_harmless() -> None:
    """Whatever a server says is one line without control characters, and not too long."""
    error = translate(Failed(grpc.StatusCode.INTERNAL, "gone\x1b[2J\r\nError: \u202efine" + "x" * 1000))

    assert error.message.startswith("gone?[2J??Error: ?fine")
    assert len(error.message) == 500


@pytest.mark.parametrize("token", ["one\ntwo", "schlüssel", "\udcff", "tab\there"])
def test_tokens_that_cannot_be_sent(token: str, tmp_path: Path) -> None:
    """A token that cannot be a header is refused with a reason, which does not repeat it."""
    with pytest.raises(InvalidRequest, match="give one line") as raised:
        Cloud("127.0.0.1:1", token=token, cache=Cache(tmp_path))

    assert token not in raised.value.message


def test_stalled_downloads_are_given_up(running: Running, cloud: Cloud, bundle_folder: Path, tmp_path: Path) -> None:
    """A download that stalls, or ends too early without an error, is lost and not thrown away."""
    running.fake.bundle = bundle_folder
    files = cloud.capabilities().bundles["tiny-edge"]
    part = tmp_path / "fetched.partial" / "model.json"
    running.fake.download_hangs = True
    with pytest.raises(CloudTimeout, match="has sent nothing"):
        list(fetch(cloud, "tiny-edge", files, tmp_path / "fetched"))
    assert part.stat().st_size == 1000

    running.fake.download_hangs, running.fake.download_bytes = False, 100
    with pytest.raises(CloudUnreachable, match=r"model.json ended after 1100 of \d+ bytes"):
        list(fetch(cloud, "tiny-edge", files, tmp_path / "fetched"))
    assert part.stat().st_size == 1100

    running.fake.download_bytes = None
    list(fetch(cloud, "tiny-edge", files, tmp_path / "fetched"))
    assert bundles.open_bundle(tmp_path / "fetched").verify() == []


def test_full_without_a_delay_has_one() -> None:
    """A full queue is worth asking again even where it does not say when; a lost connection by itself is not."""
    assert translate(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED)).retry_delay_s == 0.5
    assert translate(Failed(grpc.StatusCode.UNAVAILABLE)).retry_delay_s is None


@pytest.mark.parametrize(
    ("domain", "reason"), [("hybridsd", Reason.SIZE_INVALID), ("googleapis.com", Reason.FIELD_INVALID)]
)
def test_reasons_of_others_are_not_ours(domain: str, reason: Reason) -> None:
    """An ErrorInfo counts only in our domain; the field at fault is told in any case."""
    info = error_details_pb2.ErrorInfo(reason="SIZE_INVALID", domain=domain)
    field = error_details_pb2.BadRequest(field_violations=[{"field": "width"}])
    failed = Failed(grpc.StatusCode.INVALID_ARGUMENT)
    failed.status = status_pb2.Status(code=3, message="no details")
    for detail in (info, field):
        failed.status.details.add().Pack(detail)
    error = translate(failed)

    assert (error.reason, error.field) == (reason, "width")


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_authorities_are_checked_first(content: bytes, tmp_path: Path) -> None:
    """A file that holds no certificate is refused before anybody is spoken to."""
    (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(InvalidRequest, match="`tls_ca`") as raised:
        Cloud("127.0.0.1:1", tls_ca=tmp_path / "ca.pem", cache=Cache(tmp_path))

    assert raised.value.field == "tls_ca"


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ("SERVER: Received message larger than max (5000000 vs. 4194304)", Reason.SIZE_INVALID),
        ("Stream removed (CLIENT: Received message larger than max (5 vs. 4))", Reason.INTERNAL),
    ],
)
def test_too_large_is_not_busy(details: str, reason: Reason) -> None:
    """A message beyond gRPC's limit is no full queue: coming again does not help."""
    error = translate(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, details))

    assert (error.reason, error.retry_delay_s) == (reason, None)


def test_cache_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store does not grow without end, and keys are not readable from it."""
    monkeypatch.setattr(caches, "MAX_OBJECTS", 3)
    cache = Cache(tmp_path)
    for number in range(8):
        cache.store(bytes([number] * 32), b"x", ("embeds", f"secret {number}"))

    assert len(list((tmp_path / "objects").iterdir())) == 3
    assert cache.find("embeds", "secret 7") == (bytes([7] * 32), b"x")
    assert not [path for path in tmp_path.rglob("*") if "secret" in path.name]


def test_silent_hosts_are_given_up(tmp_path: Path) -> None:
    """A host that takes connections and never says a word is not waited for beyond the connect timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            Cloud(target, cache=Cache(tmp_path), connect_timeout_s=0.3) as cloud,
            pytest.raises((CloudUnreachable, CloudTimeout)),
        ):
            cloud.capabilities()


def test_silent_hosts_do_not_stop_a_picture(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """Nor does an image wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with Cloud(target, cache=Cache(tmp_path), connect_timeout_s=0.3, idle_timeout_s=30) as cloud:
            *_, last = generate(resolve(Request(prompt="a fox"), bundle.manifest), bundle, models, cloud)

    assert last.result.fallback_reason is Reason.UNAVAILABLE


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ("errors resolving nowhere:1: [Domain name not found]", "here:1 is unknown"),
        ("failed to connect to all addresses; last error: Connection refused", "here:1 refuses connections"),
        ("failed to connect to all addresses; last error: Timeout", "here:1 cannot be reached"),
    ],
)
def test_no_server_is_explained(details: str, says: str, tmp_path: Path) -> None:
    """Where there is no server, the error says so in plain words and what to do."""
    with Cloud("here:1", cache=Cache(tmp_path)) as cloud:
        error = cloud.translate(Failed(grpc.StatusCode.UNAVAILABLE, details))

    assert error.message.startswith(says)
    assert "set `mode` to edge" in error.message


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls_with_an_own_authority(tmp_path: Path) -> None:
    """A server with a certificate of the given authority is spoken to; with another, or in plain text, it is not."""
    for name in ("mine", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    pair = ((tmp_path / "mine.key").read_bytes(), (tmp_path / "mine.pem").read_bytes())
    running = serve(FakeCloud(), grpc.ssl_server_credentials([pair]))
    try:
        with Cloud(running.target, tls_ca=tmp_path / "mine.pem", cache=Cache(tmp_path)) as cloud:
            assert cloud.encrypted
            assert cloud.capabilities().server_version == "0.1.0"
        by_name = running.target.replace("127.0.0.1", "localhost")
        for target, tls_ca, error in (
            (running.target, tmp_path / "other.pem", AccessDenied),  # stops like a wrong token
            (by_name, tmp_path / "mine.pem", AccessDenied),  # the certificate names the address only
            (running.target, None, CloudUnreachable),
        ):
            wrong = Cloud(target, tls_ca=tls_ca, cache=Cache(tmp_path), connect_timeout_s=1)
            with wrong as cloud, pytest.raises(error, match="`tls_ca`"):
                cloud.capabilities()
        plain = serve(FakeCloud())
        with (
            Cloud(plain.target, tls_ca=tmp_path / "mine.pem", cache=Cache(tmp_path)) as cloud,
            pytest.raises(CloudUnreachable, match=r"does not speak TLS.*`insecure`"),
        ):
            cloud.capabilities()
        plain.server.stop(grace=None).wait()
    finally:
        running.server.stop(grace=None).wait()
