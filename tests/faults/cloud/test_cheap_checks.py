"""What a server cannot start with is said before a model is loaded, and names the option."""

import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cloud_server.models.load
from cloud_server import preflight
from cloud_server.cli import main
from cloud_server.settings import Settings

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
Serve = Callable[..., str]


@pytest.fixture
def serve(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Runs `serve`, which must be refused before it loads anything, and returns what it says."""

    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(cloud_server.models.load, "load_model", load_model)

    def run(*arguments: object) -> str:
        command = ["serve", "--model", f"tiny={tiny_folder}", "--port", "0", "--device", "cpu", *map(str, arguments)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2, (result.output, result.exception)
        return " ".join(result.output.replace("│", " ").split())

    return run


def make_pair(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    """Returns certificate and key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(
        [*command, *(more or ("-nodes",)), "-keyout", key, "-out", cert, "-subj", "/CN=localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use(serve: Serve, host: str) -> None:
    """And not the port that it asks the system for."""
    with socket.socket() as taken:
        taken.bind((host, 0))
        taken.listen(1)
        says = serve("--host", host, "--port", taken.getsockname()[1])

    assert "--port" in says
    assert "in use" in says


def test_the_port_of_metrics_is_taken(serve: Serve) -> None:
    """Before models load, by its own name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        says = serve("--port", 0, "--metrics-port", taken.getsockname()[1])

    assert "choose another --metrics-port" in says


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost"])
def test_a_free_port_is_free(host: str) -> None:
    """The check leaves nothing behind, and reads addresses as the server does."""
    for _ in range(2):
        preflight.check_port(host, 0)


def test_an_address_of_another_machine(serve: Serve) -> None:
    """Of the documentation's net."""
    assert "--host" in serve("--host", "192.0.2.1", "--insecure")


@needs_openssl
def test_a_certificate_and_the_key_of_another(serve: Serve, tmp_path: Path) -> None:
    """Each by itself is good."""
    (cert, _), (_, key) = make_pair(tmp_path, "one"), make_pair(tmp_path, "two")

    assert "is not the key of --tls-cert" in serve("--tls-cert", cert, "--tls-key", key)


@needs_openssl
def test_what_is_no_pem(serve: Serve, tmp_path: Path) -> None:
    """Garbage, nothing, a body that is cut, the two exchanged, a key with a password."""
    cert, key = make_pair(tmp_path, "good")
    garbage = tmp_path / "garbage"
    for content in (b"", b"\xff\x00garbage"):
        garbage.write_bytes(content)
        assert "--tls-cert" in serve("--tls-cert", garbage, "--tls-key", key)
        assert "--tls-key" in serve("--tls-cert", cert, "--tls-key", garbage)
    garbage.write_bytes(cert.read_bytes()[:200] + b"\n-----END CERTIFICATE-----\n")
    assert "--tls-cert" in serve("--tls-cert", garbage, "--tls-key", key)
    assert "no PEM" in serve("--tls-cert", key, "--tls-key", cert)
    locked_cert, locked_key = make_pair(tmp_path, "locked", "-passout", "pass:secret")
    assert "encrypted" in serve("--tls-cert", locked_cert, "--tls-key", locked_key)
    preflight.check_tls(cert, key)


def test_a_model_given_twice(serve: Serve, tiny_folder: Path) -> None:
    """By its id, whatever it is."""
    says = serve("--model", f"tiny={tiny_folder / 'other'}")

    assert "tiny is given twice" in says
    checked = CliRunner().invoke(main, ["check", "--model", f"tiny={tiny_folder}", "--model", f"tiny={tiny_folder}"])
    assert checked.exit_code == 2
    assert "tiny is given twice" in checked.output


def test_a_probe_with_an_authority_that_is_none(tmp_path: Path) -> None:
    """It is not the server that does not answer."""
    (tmp_path / "ca.pem").write_bytes(b"garbage")
    result = CliRunner().invoke(main, ["probe", "--tls-ca", str(tmp_path / "ca.pem")])

    assert result.exit_code == 2
    assert "--tls-ca" in result.output


def test_an_adapter_given_twice(serve: Serve) -> None:
    """For one model; for two models it may be."""
    says = serve("--lora", "style=a.safetensors", "--lora", "tiny:style=b.safetensors")

    assert "two loras have the name style" in says


def test_an_adapter_that_is_not_there(serve: Serve, tmp_path: Path) -> None:
    """A file, or a folder without one."""
    assert "lora style" in serve("--lora", "style=a.safetensors")
    assert "lora style" in serve("--lora", f"style={tmp_path}")


def test_the_second_model_is_not_one(serve: Serve, tmp_path: Path) -> None:
    """It is looked at before the first is loaded."""
    (tmp_path / "model.ckpt").touch()

    assert "pickle" in serve("--model", f"other={tmp_path / 'model.ckpt'}")


def test_a_bundle_without_a_manifest(serve: Serve, tmp_path: Path) -> None:
    """Or twice the same."""
    assert "model.json" in serve("--bundle", tmp_path)


def test_the_folder_of_the_port_file(serve: Serve, tmp_path: Path) -> None:
    """It is not made."""
    assert "--port-file" in serve("--port-file", tmp_path / "none" / "port")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"), (b"\n \n", "is empty"), (b"# only a comment\n", "is empty"), (b"\xff\xfe", "cannot be read"),
        (b"good\ntwo words\n", "line 2"), ("schl\u00fcssel".encode(), "line 1"),
    ],
)  # fmt: skip
def test_files_without_usable_tokens(serve: Serve, tmp_path: Path, content: bytes, says: str) -> None:
    """A token that nobody can send locks everybody out."""
    (tmp_path / "tokens").write_bytes(content)
    output = serve("--token-file", tmp_path / "tokens")

    assert says in output
    assert "--token-file" in output
    assert "two words" not in output


def test_several_tokens(tmp_path: Path) -> None:
    """One a line; comments and empty lines are none."""
    (tmp_path / "tokens").write_text("# the new one\nnew\n\n  old  \r\n")

    found = preflight.read_tokens(tmp_path / "tokens")
    good = [found.find(token) is not None for token in ("new", "old", "# the new one", "")]
    assert good == [True, True, False, False]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--heartbeat", "0"), ("--heartbeat", "10.1"), ("--stall-timeout", "0"), ("--stall-exit", "30")],
)
def test_times_that_do_not_fit_together(serve: Serve, option: str, value: str) -> None:
    """A heartbeat that edges take for silence, an end before the illness."""
    assert option in serve(option, value)


@pytest.mark.parametrize("option", ["--heartbeat", "--drain-timeout", "--stall-timeout", "--stall-exit"])
def test_times_that_are_no_numbers(serve: Serve, option: str) -> None:
    """They would pass every comparison: nothing would ever be stuck."""
    assert f"{option} is nan" in serve(option, "nan")


def test_no_size_that_any_image_can_have(serve: Serve) -> None:
    """Every request would be refused."""
    assert "--max-size is 15, but model tiny takes multiples of 16 pixels" in serve("--max-size", "15")


def test_settings_check_themselves() -> None:
    """Also where no command line has looked at them."""
    for changes in ({"heartbeat_s": 10.1}, {"stall_timeout_s": 60.0, "stall_exit_s": 59.0}):
        with pytest.raises(ValueError, match="choose at"):
            Settings(models=("tiny",), **changes)  # type: ignore[arg-type]
