"""`hybridsd doctor`: what it says agrees with how it exits."""

import json
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from edge_client.cli import system_info
from edge_client.cli.main import main
from hybridsd import certificates
from tests.support.certificates import issue
from tests.support.fake_cloud import FakeCloud, serve


@pytest.mark.parametrize("free_bytes", [1 << 40, 1])
def test_json_agrees_with_the_exit_code(bundle_folder: Path, free_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is ok has exit code 0, one that is not has another, and the whole is its first failure."""
    monkeypatch.setattr(system_info, "read_device", lambda: system_info.Device(2, False, free_bytes))
    done = CliRunner().invoke(main, ["doctor", "--offline", "--json", "--bundle", str(bundle_folder)])
    said = json.loads(done.stdout)

    assert all(check["ok"] == (check["exit_code"] == 0) for check in said["checks"])
    assert said["ok"] == all(check["ok"] for check in said["checks"]) == (free_bytes > 1)
    assert said["exit_code"] == done.exit_code == (0 if free_bytes > 1 else 70)


def test_doctor_says_how_the_link_is_secured(bundle_folder: Path) -> None:
    """Plain text, or which certificate is good; the options of TLS reach the connection."""
    issued = issue("server")
    plain = serve(FakeCloud())
    secure = serve(FakeCloud(), grpc.ssl_server_credentials([(issued.key_pem, issued.pem)]))
    shown = certificates.show(bytes.fromhex(issued.fingerprint))
    said = {}
    try:
        for name, words in {
            "plain": ["--server", plain.target],
            "pinned": ["--server", secure.target, "--tls-fingerprint", issued.fingerprint],
            "wrong": ["--server", secure.target, "--tls-fingerprint", "00" * 32],
        }.items():
            done = CliRunner().invoke(main, ["doctor", "--json", "--bundle", str(bundle_folder), *words])
            said[name] = {check["name"]: check for check in json.loads(done.stdout)["checks"]}["cloud"]
    finally:
        for running in (plain, secure):
            running.server.stop(grace=None).wait()

    assert "(plain text)" in said["plain"]["detail"]
    assert f"(encrypted, certificate pinned to {shown})" in said["pinned"]["detail"]
    assert (said["wrong"]["ok"], said["wrong"]["exit_code"]) == (False, 3)
    assert shown in said["wrong"]["detail"]
    assert "--tls-fingerprint" in said["wrong"]["detail"]
