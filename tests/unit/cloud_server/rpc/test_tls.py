"""TLS at the cloud: certificates that change while it serves, and those of callers. Over real connections."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from cloud_server import preflight
from cloud_server.cli import main
from cloud_server.models.load import Model
from cloud_server.rpc.denoising_service import DenoisingService
from cloud_server.rpc.peer import peer_name
from cloud_server.rpc.server import CloudServer
from cloud_server.settings import Settings
from hybridsd import certificates
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.support.certificates import Issued, issue
from tests.support.engine_fakes import GatedDenoiser

Log = Callable[[], list[dict[str, Any]]]


@asynccontextmanager
async def serving(model: Model, **options: Any) -> AsyncIterator[int]:
    """Serves on a free port."""
    server = CloudServer(Settings(**{"models": ("tiny",), "port": 0, "threads": 1, **options}), {"tiny": model})
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop(0.0)


@asynccontextmanager
async def connected(port: int, authority: bytes, client: Issued | None = None) -> AsyncIterator[Any]:
    """A connection of its own."""
    pair = (None, None) if client is None else (client.key_pem, client.pem)
    credentials = grpc.ssl_channel_credentials(authority, *pair)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        yield denoising_service_pb2_grpc.DenoisingServiceStub(channel)


async def is_taken(port: int, authority: bytes, client: Issued | None = None) -> bool:
    """Whether a new connection comes about."""
    async with connected(port, authority, client) as stub:
        call = stub.GetCapabilities(pb.GetCapabilitiesRequest())
        code = await call.code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    return code is grpc.StatusCode.OK


async def test_a_new_connection_sees_a_new_certificate(
    tiny_model: Model, gated: GatedDenoiser, tmp_path: Path, log_lines: Log
) -> None:
    """A stream that runs goes on meanwhile, over the connection of the old one."""
    first, second = issue("first"), issue("second")
    cert, key = first.write(tmp_path, "server")
    model = replace(tiny_model, denoiser=gated)
    async with serving(model, tls_cert=cert, tls_key=key) as port, connected(port, first.pem) as old:
        request = pb.DenoiseRequest(text=pb.TextConditioning(prompt="a fox"), handoff_step=2)
        stream = old.Denoise(request)
        kinds = [(await stream.read()).WhichOneof("event")]

        second.write(tmp_path, "server")
        assert await is_taken(port, second.pem)
        assert not await is_taken(port, first.pem)

        gated.open()
        while (answer := await stream.read()) is not grpc.aio.EOF:
            kinds.append(answer.WhichOneof("event"))
    assert kinds[-1] == "finished"
    reloaded = [line for line in log_lines() if line["event"] == "certificate_reloaded"]
    assert [line["fingerprint"] for line in reloaded] == [certificates.show(bytes.fromhex(second.fingerprint))]


async def test_a_broken_pair_keeps_the_old(tiny_model: Model, tmp_path: Path, log_lines: Log) -> None:
    """It is said once; when the pair is whole, it is taken."""
    first, second = issue("first"), issue("second")
    cert, key = first.write(tmp_path, "server")
    async with serving(tiny_model, tls_cert=cert, tls_key=key) as port:
        cert.write_bytes(second.pem)  # the key comes later
        assert await is_taken(port, first.pem)
        assert await is_taken(port, first.pem)
        broken = [line for line in log_lines() if line["event"] == "certificate_not_reloaded"]
        second.write(tmp_path, "server")
        assert await is_taken(port, second.pem)

    assert len(broken) == 1
    assert "is not the key of" in broken[0]["message"]


async def test_callers_need_a_certificate(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the authority that is in the file, which may change; its name is who calls."""
    server, ours, theirs = issue("server"), issue("ours", is_ca=True), issue("theirs", is_ca=True)
    alice, mallory = issue("alice", by=ours, names=()), issue("mallory", by=theirs, names=())
    cert, key = server.write(tmp_path, "server")
    authority = tmp_path / "ca.pem"
    authority.write_bytes(ours.pem)
    names: list[str | None] = []
    answer = DenoisingService.GetCapabilities

    async def noted(self: DenoisingService, request: Any, context: Any) -> Any:
        names.append(peer_name(context))
        return await answer(self, request, context)

    monkeypatch.setattr(DenoisingService, "GetCapabilities", noted)
    async with serving(tiny_model, tls_cert=cert, tls_key=key, tls_client_ca=authority) as port:
        assert await is_taken(port, server.pem, alice)
        for stranger in (None, mallory, issue("alice"), issue("alice", by=ours, names=(), days=-1)):
            assert not await is_taken(port, server.pem, stranger)
        authority.write_bytes(theirs.pem)
        assert not await is_taken(port, server.pem, alice)
        assert await is_taken(port, server.pem, mallory)

    assert names == ["alice", "mallory"]


async def test_beyond_loopback_there_is_tls(tiny_model: Model, tmp_path: Path, log_lines: Log) -> None:
    """With a certificate that is made, is the same after a restart, and whose fingerprint is logged and printed."""
    shown = []
    for _ in range(2):
        async with serving(tiny_model, host="0.0.0.0", tls_dir=tmp_path / "tls") as port:
            content = (tmp_path / "tls" / certificates.FILE).read_bytes()
            shown.append(certificates.show(certificates.fingerprint(content)))
            assert await is_taken(port, certificates.certificate_only(content).encode())
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    printed = CliRunner().invoke(main, ["fingerprint", "--tls-dir", str(tmp_path / "tls")])

    assert printed.stdout == f"{shown[0]}\n"
    assert shown[0] == shown[1]
    assert [line["fingerprint"] for line in log_lines() if line["event"] == "certificate"] == shown


async def test_probes_of_a_server_with_tls(tiny_model: Model, tmp_path: Path) -> None:
    """On this machine any certificate is good, and one with a fingerprint where that is right; plain text never."""
    ours = issue("ours", is_ca=True)
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    client = [str(path) for path in issue("probe", by=ours, names=()).write(tmp_path, "probe")]
    pair = ["--client-cert", client[0], "--client-key", client[1]]

    async def probe(port: int, *options: str) -> tuple[int, str]:
        words = ["probe", "--server", f"127.0.0.1:{port}", *options]
        result = await asyncio.to_thread(CliRunner().invoke, main, words)
        return result.exit_code, result.output

    async with serving(tiny_model, host="0.0.0.0", tls_dir=tmp_path / "tls") as port:
        content = (tmp_path / "tls" / certificates.FILE).read_bytes()
        right = certificates.show(certificates.fingerprint(content))
        assert await probe(port, "--tls") == (0, "SERVING\n")
        assert await probe(port, "--tls-fingerprint", right.lower()) == (0, "SERVING\n")
        code, said = await probe(port)
        assert code == 4
        assert "give --tls if it speaks TLS" in said
        code, said = await probe(port, "--tls-fingerprint", "00" * 32)
        assert code == 4
        assert right in said
        assert (await probe(port, "--tls-fingerprint", "00"))[0] == 2
    async with serving(tiny_model, tls_dir=tmp_path / "tls", tls_client_ca=tmp_path / "ca.pem") as port:
        code, said = await probe(port, "--tls")
        assert code == 4
        assert "give --client-cert and --client-key if it asks for them" in said
        assert await probe(port, "--tls", *pair) == (0, "SERVING\n")
    async with serving(tiny_model) as port:
        code, said = await probe(port, "--tls")
        assert code == 4
        assert "does not speak TLS; leave out --tls" in said


def test_fingerprint_before_the_first_start(tmp_path: Path) -> None:
    """Makes the certificate that the server then has; `--pem` prints it without its key."""
    words = ["fingerprint", "--tls-dir", str(tmp_path / "tls"), "--tls-name", "cloud.test"]
    first, pem = CliRunner().invoke(main, words), CliRunner().invoke(main, [*words, "--pem"])
    settings = Settings(models=("tiny",), host="0.0.0.0", tls_dir=tmp_path / "tls")
    provided = preflight.provide_certificate(settings)

    assert certificates.read_fingerprint(first.stdout) == certificates.fingerprint(pem.stdout)
    assert provided.tls_cert is not None
    assert certificates.fingerprint(provided.tls_cert.read_bytes()) == certificates.fingerprint(pem.stdout)
    assert "PRIVATE" not in pem.stdout
    assert "cloud.test" in certificates.names_of(pem.stdout)


def test_a_certificate_that_cannot_be_kept(tmp_path: Path) -> None:
    """Is no reason for plain text."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--tls-dir"):
        preflight.provide_certificate(Settings(models=("tiny",), host="0.0.0.0", tls_dir=tmp_path / "file" / "tls"))
