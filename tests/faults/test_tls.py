"""Somebody in between, or a certificate that is not what it should be: nobody is spoken to, and nothing hangs."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd import certificates
from hybridsd.errors import AccessDenied, CloudUnreachable, InvalidRequest, Reason
from tests.support.certificates import Issued, issue
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.patience import HANG_S
from tests.support.slow_link import SlowLink

Serve = Callable[..., Running]


@pytest.fixture
def secure() -> Iterator[Serve]:
    """Starts clouds with a certificate, which ask for certificates of an authority if it is given."""
    with contextlib.ExitStack() as stack:

        def start(issued: Issued, client_ca: Issued | None = None) -> Running:
            credentials = grpc.ssl_server_credentials(
                [(issued.key_pem, issued.pem)], None if client_ca is None else client_ca.pem, client_ca is not None
            )
            running = serve(FakeCloud(), credentials)
            stack.callback(lambda: running.server.stop(grace=None).wait())
            return running

        yield start


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    with contextlib.ExitStack() as stack:

        def make(target: str, *pins: str, **options: Any) -> Cloud:
            options = {"connect_timeout_s": HANG_S, **options}
            cloud = Cloud(target, tls_fingerprints=pins, cache=Cache(tmp_path / "cache"), **options)
            return stack.enter_context(cloud)

        yield make


def shown(issued: Issued) -> str:
    return certificates.show(bytes.fromhex(issued.fingerprint))


@pytest.mark.parametrize("names", [("localhost", "127.0.0.1"), ("elsewhere.test",), ("*.elsewhere.test",), ()])
def test_the_pinned_certificate_is_good(names: tuple[str, ...], secure: Serve, connect: Callable[..., Cloud]) -> None:
    """Whatever it names, and whoever signed it; with colons or without, in any case."""
    for issued in (issue("server", names=names), issue("server", names=names, by=issue("ca", is_ca=True))):
        running = secure(issued)
        for pin in (issued.fingerprint, shown(issued)):
            cloud = connect(running.target, pin)
            assert cloud.capabilities().models
            assert shown(issued) in cloud.trust.describe()


def test_a_wrong_pin(secure: Serve, connect: Callable[..., Cloud], bundle: Bundle, models: Models) -> None:
    """No call arrives; the error has both fingerprints, and an image is not drawn without it."""
    issued, other = issue("server"), issue("other")
    running = secure(issued)
    cloud = connect(running.target, other.fingerprint, token="secret")
    with pytest.raises(AccessDenied, match="`tls_fingerprint`") as raised:
        cloud.capabilities()
    assert raised.value.reason is Reason.UNAUTHENTICATED
    assert shown(issued) in raised.value.message
    assert shown(other) in raised.value.message
    with pytest.raises(AccessDenied):
        list(generate(resolve(Request(prompt="a fox"), bundle.manifest), bundle, models, cloud))
    cloud.cancel("nothing")
    assert running.fake.requests == []


def test_somebody_who_has_the_certificate_but_not_its_key(
    secure: Serve, connect: Callable[..., Cloud], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown at first is public; the channel's own handshake needs the key."""
    issued = issue("server")
    impostor = secure(issue("server"))
    monkeypatch.setattr(certificates, "fetch", lambda *_args, **_options: issued.pem.decode())
    cloud = connect(impostor.target, issued.fingerprint)
    with pytest.raises(AccessDenied, match="certificate"):
        cloud.capabilities()


def test_another_certificate_at_a_reconnect(secure: Serve, connect: Callable[..., Cloud]) -> None:
    """One that was pinned as well is taken, the next time; any other is refused, with both fingerprints."""
    first, second, third = issue("first"), issue("second"), issue("third")
    ports = [int(secure(issued).target.rpartition(":")[2]) for issued in (first, second, third)]
    with SlowLink(ports[0]) as link:
        cloud = connect(link.target, first.fingerprint, second.fingerprint)
        assert cloud.capabilities().models

        link.lead_to(ports[1])
        with pytest.raises(CloudUnreachable, match="renewed"):
            calls_until_refused(cloud)
        assert cloud.capabilities().models

        link.lead_to(ports[2])
        with pytest.raises(AccessDenied) as raised:
            calls_until_refused(cloud)
        assert shown(third) in raised.value.message
        link.lead_to(ports[1])
        assert first_good(cloud).models


def test_an_image_at_a_renewal(
    secure: Serve, connect: Callable[..., Cloud], bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renewed certificate is pinned as well: the cloud draws, though the first connection fails."""
    first, second = issue("first"), issue("second")
    renewed = secure(second)
    shows = iter([first, second])
    monkeypatch.setattr(certificates, "fetch", lambda *_args, **_options: next(shows).pem.decode())
    cloud = connect(renewed.target, first.fingerprint, second.fingerprint)
    *_, last = generate(
        resolve(Request(prompt="a fox", mode="hybrid", cloud_steps=2), bundle.manifest), bundle, models, cloud
    )

    assert isinstance(last, Finished)
    assert last.result.fallback_reason is None
    assert len(renewed.fake.requests) == 1


def calls_until_refused(cloud: Cloud) -> None:
    """The connection is broken a little after it is said to be: then calls find the next."""
    give_up_at = time.monotonic() + HANG_S
    while time.monotonic() < give_up_at:
        try:
            cloud.capabilities()
        except CloudUnreachable as error:
            if "renewed" in error.message:
                raise
    raise AssertionError


def first_good(cloud: Cloud) -> Any:
    give_up_at = time.monotonic() + HANG_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(CloudUnreachable, AccessDenied):
            return cloud.capabilities()
    raise AssertionError


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_certificate_that_has_ended(
    is_pinned: bool, secure: Serve, tmp_path: Path, connect: Callable[..., Cloud]
) -> None:
    """Pinned or of a known authority, it is not good any more, and that is said."""
    issued = issue("server", days=-1)
    (tmp_path / "ca.pem").write_bytes(issued.pem)
    running = secure(issued)
    trusts = {} if is_pinned else {"tls_ca": tmp_path / "ca.pem"}
    cloud = connect(running.target, *([issued.fingerprint] if is_pinned else []), **trusts)
    with pytest.raises(AccessDenied, match="expired"):
        cloud.capabilities()


def test_a_certificate_that_nobody_vouches_for(secure: Serve, tmp_path: Path, connect: Callable[..., Cloud]) -> None:
    """The message has its fingerprint, and says how to pin it."""
    issued = issue("server")
    running = secure(issued)
    (tmp_path / "ca.pem").write_bytes(issue("other").pem)
    cloud = connect(running.target, tls_ca=tmp_path / "ca.pem")
    with pytest.raises(
        AccessDenied, match=r"not trusted.*`tls_ca`.*`hybridsd-cloud fingerprint`.*`tls_fingerprint`"
    ) as raised:
        cloud.capabilities()
    assert shown(issued) in raised.value.message


def test_a_server_that_speaks_plain_text(connect: Callable[..., Cloud], running: Running) -> None:
    """Is not spoken to, and the message says of `insecure`."""
    cloud = connect(running.target, "ab" * 32, insecure=True)
    assert cloud.encrypted
    with pytest.raises(CloudUnreachable, match=r"does not speak TLS.*`insecure`"):
        cloud.capabilities()


def test_a_server_that_asks_who_calls(secure: Serve, tmp_path: Path, connect: Callable[..., Cloud]) -> None:
    """Without a certificate, or with a stranger's, the message names the options; with the right one all is well."""
    issued, authority = issue("server"), issue("ca", is_ca=True)
    running = secure(issued, authority)
    right, wrong = issue("edge", by=authority, names=()), issue("edge", names=())
    with pytest.raises(CloudUnreachable, match="`client_cert`"):
        connect(running.target, issued.fingerprint).capabilities()
    cert, key = wrong.write(tmp_path, "edge")
    cloud = connect(running.target, issued.fingerprint, client_cert=cert, client_key=key)
    with pytest.raises(CloudUnreachable, match="`client_cert`"):
        cloud.capabilities()

    right.write(tmp_path, "edge")  # the files are looked at again
    assert cloud.capabilities().models
    assert str(cert) in cloud.trust.describe()


def test_new_files_that_cannot_be_used(secure: Serve, tmp_path: Path, connect: Callable[..., Cloud]) -> None:
    """What was read before stays good."""
    issued, authority = issue("server"), issue("ca", is_ca=True)
    running = secure(issued, authority)
    cert, key = issue("edge", by=authority, names=()).write(tmp_path, "edge")
    cloud = connect(running.target, issued.fingerprint, client_cert=cert, client_key=key)
    for spoil in (lambda: key.write_bytes(b"junk"), cert.unlink):
        spoil()
        assert cloud.capabilities().models
    with pytest.raises(InvalidRequest, match="`client_cert`"):
        connect(running.target, issued.fingerprint, client_cert=key, client_key=key)


def test_a_handshake_that_stalls(connect: Callable[..., Cloud], bundle: Bundle, models: Models) -> None:
    """Who takes the connection and says nothing is not waited for; an image is drawn here, and it is remembered."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cloud = connect(f"127.0.0.1:{silent.getsockname()[1]}", "ab" * 32, connect_timeout_s=0.2)
        with pytest.raises(CloudUnreachable, match="certificate within"):
            cloud.capabilities()
        assert cloud.away is not None
        *_, last = generate(resolve(Request(prompt="a fox"), bundle.manifest), bundle, models, cloud)

    assert isinstance(last, Finished)
    assert last.result.fallback_reason is Reason.UNAVAILABLE


def test_a_name_that_is_looked_up_for_ever(connect: Callable[..., Cloud], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many wait for one answer, for a bounded time, and hold one thread; when it comes, all is well."""
    release, lookups = threading.Event(), []

    def look_up(*_args: Any, **_options: Any) -> str:
        lookups.append(1)
        release.wait(HANG_S)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(certificates, "fetch", look_up)
    cloud = connect("cloud.test:1", "ab" * 32, connect_timeout_s=0.1)
    outcomes: list[str] = []

    def ask() -> None:
        with pytest.raises(CloudUnreachable) as raised:
            cloud.capabilities()
        outcomes.append(raised.value.message)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert len(outcomes) == 4
    assert len(lookups) == 1
    release.set()


def test_a_server_that_breaks_off(connect: Callable[..., Cloud]) -> None:
    """In the middle of a handshake, or with what is no TLS."""
    for answer in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(5), b"\x15\x03\x03\x00\x02\x02\x28"):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def speak(listener: socket.socket = listener, answer: bytes = answer) -> None:
                near, _ = listener.accept()
                with near:
                    near.recv(9999)
                    near.sendall(answer)

            speaker = threading.Thread(target=speak)
            speaker.start()
            with pytest.raises(CloudUnreachable):
                connect(f"127.0.0.1:{listener.getsockname()[1]}", "ab" * 32).capabilities()
            speaker.join(HANG_S)


def test_nothing_is_sent_before_it_is_needed(connect: Callable[..., Cloud]) -> None:
    """A pinned cloud is spoken to when it is first asked, not when it is named; a cancel is no reason."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        cloud = connect(f"127.0.0.1:{listener.getsockname()[1]}", "ab" * 32)
        cloud.cancel("nothing")
        cloud.close()
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tls_fingerprints": ["ab"]}, "tls_fingerprint"),
        (
            {"tls_fingerprints": ["ab" * 32], "tls_ca": Path(ssl.get_default_verify_paths().cafile or "ca.pem")},
            "tls_fingerprint",
        ),
        ({"client_cert": Path("cert.pem")}, "client_cert"),
        ({"client_key": Path("key.pem")}, "client_cert"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        Cloud("127.0.0.1:1", cache=Cache(tmp_path), **options)
    assert raised.value.field == field
