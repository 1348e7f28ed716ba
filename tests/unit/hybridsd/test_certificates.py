"""Certificates that are made here, fingerprints, and files that are read again."""

import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hybridsd import certificates
from hybridsd.certificates import CertificateFiles, own_certificate
from tests.support.certificates import issue


def test_a_certificate_of_ones_own(tmp_path: Path) -> None:
    """It names who it is for, is the owner's alone, good for years, and TLS can use it and check it strictly."""
    names = certificates.names_of_this_machine(["0.0.0.0", "[::]", "cloud.test", "203.0.113.5", "no name"])
    made = own_certificate(tmp_path / "new" / "tls", names)
    content = made.path.read_bytes()
    named = certificates.names_of(content)

    assert made.is_new
    assert made.path.stat().st_mode & 0o777 == 0o600
    assert {"localhost", "127.0.0.1", "::1", "cloud.test", "203.0.113.5"} <= set(named)
    assert not {"0.0.0.0", "::", "no name"} & set(named)
    assert certificates.valid_until(content) > datetime.now(UTC) + timedelta(days=3600)
    certificates.check_pair(made.path, made.path)
    assert b"PRIVATE" not in certificates.certificate_only(content).encode()
    client, server = (
        ssl.create_default_context(cadata=certificates.certificate_only(content)),
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
    )
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(made.path)
    shake_hands(client, server, "cloud.test")


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bytes:
    """Returns the certificate that a client takes, by which it is sure of a name."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=name), server.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].getpeercert(binary_form=True) or b""


def test_it_stays_the_same_until_it_nears_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is called at a later start, pins stay good; a new one says that it replaces another."""
    first = own_certificate(tmp_path, ["localhost"])
    pin = certificates.fingerprint(first.path.read_bytes())
    again = own_certificate(tmp_path, ["localhost", "another"])
    assert (again.is_new, certificates.fingerprint(again.path.read_bytes())) == (False, pin)

    monkeypatch.setattr(certificates, "RENEW_DAYS", certificates.VALID_DAYS + 1)
    renewed = own_certificate(tmp_path, ["localhost"])
    assert (renewed.is_new, renewed.replaces) == (True, True)
    assert certificates.fingerprint(renewed.path.read_bytes()) != pin
    assert [path.name for path in tmp_path.iterdir()] == [certificates.FILE]
    assert renewed.path.stat().st_mode & 0o777 == 0o600


def test_two_that_start_at_once_have_one(tmp_path: Path) -> None:
    """Two processes, that found nothing there."""
    code = "import sys, pathlib; from hybridsd import certificates as c; f = pathlib.Path(sys.argv[1])\n"
    code += "print(c.show(c.fingerprint(c.own_certificate(f, ['localhost']).path.read_bytes())))"
    command = [sys.executable, "-c", code, str(tmp_path / "tls")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) for _ in range(3)]
    shown = {process.communicate()[0] for process in running}

    assert len(shown) == 1
    assert all(process.returncode == 0 for process in running)
    assert [path.name for path in (tmp_path / "tls").iterdir()] == [certificates.FILE]


def test_what_is_in_the_way(tmp_path: Path) -> None:
    """A file instead of a folder, or something else instead of a certificate, is not overwritten."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / certificates.FILE).write_text("mine")
    for folder in (tmp_path / "file", tmp_path):
        with pytest.raises(ValueError, match=str(folder)):
            own_certificate(folder, ["localhost"])
    assert (tmp_path / certificates.FILE).read_text() == "mine"


def test_fingerprints() -> None:
    """As every tool writes them, of the first certificate of a chain."""
    issued, other = issue("server"), issue("other")
    digest = certificates.fingerprint(issued.pem + other.pem)
    shown = certificates.show(digest)

    assert digest.hex() == issued.fingerprint
    for text in (shown, shown.lower(), digest.hex(), f"sha256 Fingerprint={shown}\n", f"SHA256:{shown}", f" {shown} "):
        assert certificates.read_fingerprint(text) == digest
    assert certificates.is_pinned(issued.pem, digest)
    assert not certificates.is_pinned(other.pem, digest)


@pytest.mark.parametrize("text", ["", "AB:CD", "zz" * 32, "ab" * 20, "ab" * 33, "sha1:" + "ab" * 20])
def test_what_is_no_fingerprint(text: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        certificates.read_fingerprint(text)


@pytest.mark.parametrize(
    ("names", "host", "expected"),
    [
        (("cloud.test", "10.0.0.1"), "10.0.0.1", "10.0.0.1"),
        (("cloud.test",), "127.0.0.1", "cloud.test"),
        (("*.cloud.test",), "127.0.0.1", "pinned.cloud.test"),
        ((), "127.0.0.1", "by name"),
    ],
)
def test_the_name_that_tls_compares(names: tuple[str, ...], host: str, expected: str) -> None:
    """The host where the certificate names it, else one that it does name: it is known by its fingerprint."""
    assert certificates.name_to_expect(issue("by name", names=names).pem, host) == expected


@pytest.mark.parametrize("name", ["", "no name", "-x", "ü.test", "a" * 64, "x.test:443", "10.0.0.1/8", "a..b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="host name or address"):
        certificates.check_name(name)


Files = tuple[CertificateFiles, list[str | None]]


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., Files]:
    def watch(*paths: Path) -> Files:
        said: list[str | None] = []
        return CertificateFiles(*paths, on_reload=said.append), said

    return watch


def test_files_are_read_again_when_they_change(tmp_path: Path, watched: Callable[..., Files]) -> None:
    """Once for each change."""
    first, second, authority = issue("first"), issue("second"), issue("ca", is_ca=True)
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    files, said = watched(*first.write(tmp_path, "server"), tmp_path / "ca.pem")
    assert files.reload() is None

    second.write(tmp_path, "server")
    changed = files.reload()
    assert changed is not None
    assert (changed.cert, changed.key, changed.client_ca) == (second.pem, second.key_pem, authority.pem)
    assert files.reload() is None
    (tmp_path / "ca.pem").write_bytes(first.pem)
    changed = files.reload()
    assert changed is not None
    assert changed.client_ca == first.pem
    assert said == [None, None]


def test_files_that_cannot_be_used_change_nothing(tmp_path: Path, watched: Callable[..., Files]) -> None:
    """A certificate before its key, garbage, nothing at all: said once, and good again when they are."""
    first, second = issue("first"), issue("second")
    cert, key = first.write(tmp_path, "server")
    files, said = watched(cert, key)
    for spoil in (
        lambda: cert.write_bytes(second.pem), lambda: cert.write_bytes(b"junk"), lambda: key.write_bytes(b""),
        cert.unlink,
    ):  # fmt: skip
        spoil()
        assert files.reload() is None
        assert files.reload() is None
        assert files.current.cert == first.pem
    assert all(said)
    assert [str(cert) in (text or "") for text in said] == [True] * 4

    second.write(tmp_path, "server")
    assert files.reload() is not None
    assert said[-1] is None


def test_many_threads_reload_once(tmp_path: Path, watched: Callable[..., Files]) -> None:
    """gRPC asks from several."""
    first, second = issue("first"), issue("second")
    files, said = watched(*first.write(tmp_path, "server"))
    second.write(tmp_path, "server")
    threads = [threading.Thread(target=files.reload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert said == [None]
