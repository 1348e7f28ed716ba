"""One tenant against another: guessed ids, cancels, names of others, floods beyond a quota."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cloud_server.models.load import Model
from cloud_server.rpc.plan_pool import PlanPool
from hybridsd import tokens as token_file
from hybridsd.tokens import USER_KEY, Quota, Tokens, add_token, remove_token
from hybridsd.v1 import bundle_service_pb2
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import Client, GatedDenoiser, failure, message, until

StartServer = Callable[..., Awaitable[Client]]
Metadata = tuple[tuple[str, str], ...]


class Tenants:
    """A token file, and who calls with what."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokens.toml"
        self._secrets: dict[str, str] = {}

    def add(self, name: str, **values: Any) -> None:
        self._secrets[name] = add_token(self.path, name, **values)

    def head(self, name: str, user: str | None = None) -> Metadata:
        user_head = () if user is None else ((USER_KEY, user),)
        return (("authorization", f"Bearer {self._secrets[name]}"), *user_head)

    @property
    def secrets(self) -> list[str]:
        return list(self._secrets.values())


@pytest.fixture
def tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tenants:
    monkeypatch.setattr(token_file, "RELOAD_S", 0.0)
    found = Tenants(tmp_path)
    found.add("alice")
    found.add("bob")
    return found


async def refused(call: Awaitable[object]) -> tuple[str, str, str | None, float | None]:
    with pytest.raises(grpc.RpcError) as error:
        await call
    return failure(error.value)


async def test_an_id_is_its_owners(start_server: StartServer, gated: GatedDenoiser, tenants: Tenants) -> None:
    """Who guesses another's id gets a job of its own, cancels nothing, and supersedes nobody."""
    client = await start_server(denoiser=gated, max_batch=4, tokens=Tokens(tenants.path))
    asked = message(request_id="fox", reattach_grace=Duration(seconds=60))
    first = asyncio.create_task(client.denoise(asked, metadata=tenants.head("alice")))
    await asyncio.to_thread(gated.entered.acquire)

    for stranger in (tenants.head("bob"), tenants.head("alice", "mallory"), tenants.head("bob", "alice")):
        stopped = await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id="fox"), metadata=stranger)
        assert not stopped.cancelled
        forged = pb.CancelDenoiseRequest(request_id="fox", owner="alice")
        assert not (await client.denoising.CancelDenoise(forged, metadata=stranger)).cancelled
        listed = await client.denoising.ListJobs(pb.ListJobsRequest(), metadata=stranger)
        assert (len(listed.jobs), listed.num_jobs) == (0, 0)
    other = asyncio.create_task(
        client.denoise(message(request_id="fox", seed=9), metadata=tenants.head("bob"))
    )  # other content: no REQUEST_ID_REUSED, which would say that the id exists
    await until(lambda: client.server.engine.load().num_running == 2)
    gated.open()
    mine, theirs = await asyncio.gather(first, other)
    assert mine[-1].HasField("finished")
    assert theirs[-1].HasField("finished")
    assert mine[-2].state.arrays != theirs[-2].state.arrays


async def test_only_its_owner_attaches_again(start_server: StartServer, gated: GatedDenoiser, tenants: Tenants) -> None:
    """Also to one that has finished: another's same request is run anew."""
    client = await start_server(denoiser=gated, tokens=Tokens(tenants.path))
    gated.open()
    asked = message(request_id="fox")
    await client.denoise(asked, metadata=tenants.head("alice"))
    num_calls = len(gated.rows)
    await client.denoise(asked, metadata=tenants.head("alice"))
    assert len(gated.rows) == num_calls
    await client.denoise(asked, metadata=tenants.head("bob"))
    assert len(gated.rows) == 2 * num_calls


async def test_an_admin_stops_what_others_cannot(
    start_server: StartServer, gated: GatedDenoiser, tenants: Tenants
) -> None:
    tenants.add("root", scopes=frozenset({"admin"}))
    client = await start_server(denoiser=gated, max_batch=4, tokens=Tokens(tenants.path))
    calls = [
        asyncio.create_task(client.denoise(message(request_id="fox"), metadata=tenants.head(name)))
        for name in ("alice", "bob")
    ]
    await until(lambda: client.server.engine.load().num_running == 2)
    root = tenants.head("root")
    listed = await client.denoising.ListJobs(pb.ListJobsRequest(), metadata=root)
    assert {(job.request_id, job.owner) for job in listed.jobs} == {("fox", "alice"), ("fox", "bob")}
    only = pb.CancelDenoiseRequest(request_id="fox", owner="bob")
    assert (await client.denoising.CancelDenoise(only, metadata=root)).cancelled
    gated.open()
    assert (await refused(calls[1]))[1] == "CANCELLED"
    assert (await calls[0])[-1].HasField("finished")


@pytest.mark.parametrize("user", ["x" * 65, ""])
async def test_a_user_that_cannot_be(start_server: StartServer, tenants: Tenants, user: str) -> None:
    client = await start_server(tokens=Tokens(tenants.path))
    code, reason, field, _ = await refused(client.denoise(message(), metadata=tenants.head("alice", user)))
    assert (code, reason, field) == ("INVALID_ARGUMENT", "FIELD_INVALID", USER_KEY)


async def test_two_users_at_once_are_none(start_server: StartServer, tenants: Tenants) -> None:
    """A proxy in between must not be able to choose which counts."""
    client = await start_server(tokens=Tokens(tenants.path))
    head = (*tenants.head("alice", "ann"), (USER_KEY, "ben"))
    assert (await refused(client.denoise(message(), metadata=head)))[1] == "FIELD_INVALID"


async def test_scopes(start_server: StartServer, tenants: Tenants) -> None:
    """Each method says which it needs; any token may ask what the server can do."""
    tenants.add("grafana", scopes=frozenset({"metrics"}))
    client = await start_server(tokens=Tokens(tenants.path))
    head = tenants.head("grafana")
    for call in (
        client.denoise(message(), metadata=head),
        client.denoising.CompilePlan(pb.CompilePlanRequest(), metadata=head),
        client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id="fox"), metadata=head),
        client.denoising.ListJobs(pb.ListJobsRequest(), metadata=head),
        anext(aiter(client.bundles.DownloadFile(bundle_service_pb2.DownloadFileRequest(), metadata=head))),
    ):
        with pytest.raises(grpc.RpcError) as error:
            await call
        assert failure(error.value)[:2] == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert "scope generate" in error.value.details()  # type: ignore[attr-defined]
        assert "operator" in error.value.details()  # type: ignore[attr-defined]
    assert (await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=head)).models


async def test_a_token_that_has_expired(start_server: StartServer, tenants: Tenants) -> None:
    tenants.add("carol", expires=datetime.now(UTC) - timedelta(days=1))
    client = await start_server(tokens=Tokens(tenants.path))
    with pytest.raises(grpc.RpcError) as error:
        await client.denoise(message(), metadata=tenants.head("carol"))
    assert failure(error.value)[:2] == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    for words in ("carol", "expired", "new one"):
        assert words in error.value.details()  # type: ignore[attr-defined]


async def test_a_removed_token_ends_no_stream_and_begins_none(
    start_server: StartServer, gated: GatedDenoiser, tenants: Tenants
) -> None:
    """Its running job goes on to its end; it cannot attach again, cancel, or begin another."""
    client = await start_server(denoiser=gated, tokens=Tokens(tenants.path))
    head = tenants.head("alice")
    call = asyncio.create_task(client.denoise(message(request_id="fox"), metadata=head))
    await asyncio.to_thread(gated.entered.acquire)
    remove_token(tenants.path, "alice")
    assert (await refused(client.denoise(message(request_id="fox"), metadata=head)))[0] == "UNAUTHENTICATED"
    cancel = client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id="fox"), metadata=head)
    assert (await refused(cancel))[0] == "UNAUTHENTICATED"
    gated.open()
    assert (await call)[-1].HasField("finished")


async def test_jobs_beyond_those_at_once_wait(
    start_server: StartServer, gated: GatedDenoiser, tenants: Tenants
) -> None:
    """They are not refused, and places that are free are another's."""
    tenants.add("carol", quota=Quota(jobs=1))
    client = await start_server(denoiser=gated, max_batch=4, tokens=Tokens(tenants.path))
    many = [asyncio.create_task(client.denoise(message(seed=i), metadata=tenants.head("carol"))) for i in range(3)]
    await until(lambda: client.server.engine.load().num_queued == 2)
    one = asyncio.create_task(client.denoise(message(), metadata=tenants.head("bob")))
    await until(lambda: client.server.engine.load().num_running == 2)
    assert client.server.engine.load().num_queued == 2
    gated.open()
    for messages in await asyncio.gather(one, *many):
        assert messages[-1].HasField("finished")


async def test_a_flood_beyond_the_quota_is_its_own_trouble(
    start_server: StartServer, gated: GatedDenoiser, tenants: Tenants
) -> None:
    """Refused with the limit and a delay of its own, before anything is read; another token's job runs meanwhile."""
    tenants.add("carol", quota=Quota(jobs=1, queued=2))
    client = await start_server(denoiser=gated, max_batch=2, max_queue=64, tokens=Tokens(tenants.path))

    async def ask(seed: int) -> tuple[object, ...]:
        try:
            await client.denoise(message(seed=seed), metadata=tenants.head("carol"))
        except grpc.RpcError as error:
            return (*failure(error)[:2], bool(failure(error)[3]), quota_of(error))
        return ("ran",)

    flood = [asyncio.create_task(ask(seed)) for seed in range(40)]
    await until(lambda: sum(task.done() for task in flood) == 37)
    one = asyncio.create_task(client.denoise(message(), metadata=tenants.head("bob")))
    await until(lambda: client.server.engine.load().num_running == 2)
    gated.open()
    assert (await one)[-1].HasField("finished")
    outcomes = await asyncio.gather(*flood)
    assert outcomes.count(("ran",)) == 3
    assert outcomes.count(("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", True, "token carol: queued")) == 37


def quota_of(error: grpc.RpcError) -> str:
    """Returns the subject of the `google.rpc.QuotaFailure` of an error."""
    found = error_details_pb2.QuotaFailure()
    for detail in rpc_status.from_call(error).details:  # type: ignore[union-attr]
        if detail.Unpack(found):
            assert found.violations[0].description == error.details()  # type: ignore[attr-defined]
            return found.violations[0].subject
    return ""


async def test_steps_are_charged_once_and_given_back(
    start_server: StartServer, gated: GatedDenoiser, tenants: Tenants
) -> None:
    """Attaching is free, a job that is stopped gives back what it did not run, and users share their token's quota."""
    tenants.add("carol", quota=Quota(steps_per_minute=6))
    client = await start_server(denoiser=gated, tokens=Tokens(tenants.path))
    asked, head = message(request_id="fox", reattach_grace=Duration(seconds=60)), tenants.head("carol", "ann")
    call = asyncio.create_task(client.denoise(asked, metadata=head))
    await asyncio.to_thread(gated.entered.acquire)
    again = asyncio.create_task(client.denoise(asked, metadata=head))
    assert (await refused(call))[1] == "SUPERSEDED"
    for user in ("ann", "ben"):
        code, reason, _, delay_s = await refused(client.denoise(message(), metadata=tenants.head("carol", user)))
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
        assert delay_s
    assert (await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id="fox"), metadata=head)).cancelled
    gated.allow(1)
    assert (await refused(again))[1] == "CANCELLED"
    gated.open()
    assert (await client.denoise(message(), metadata=head))[-1].HasField("finished")


async def test_a_job_that_no_quota_allows_is_refused_before_its_plan(
    start_server: StartServer, tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is allowed, and no time to come again."""
    tenants.add("carol", quota=Quota(steps_per_minute=100, pixels=32 * 32))
    client = await start_server(tokens=Tokens(tenants.path))

    async def plan(*_given: object) -> None:
        raise AssertionError("a plan was asked for")

    monkeypatch.setattr(PlanPool, "plan", plan)
    steps = message(scheduler=pb.SchedulerSpec(name="dpmpp_2m", num_inference_steps=1000), handoff_step=1000)
    code, reason, _, delay_s = await refused(client.denoise(steps, metadata=tenants.head("carol")))
    assert (code, reason, delay_s) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", None)
    size = await refused(client.denoise(message(width=64, height=64), metadata=tenants.head("carol")))
    assert size == ("INVALID_ARGUMENT", "SIZE_INVALID", "width", None)


async def test_logs_name_token_and_user_and_never_the_secret(
    start_server: StartServer, tenants: Tenants, log_lines: Any
) -> None:
    tenants.add("grafana", scopes=frozenset({"metrics"}))
    client = await start_server(tokens=Tokens(tenants.path))
    await client.denoise(message(), metadata=tenants.head("alice", "ann"))
    await refused(client.denoise(message(), metadata=tenants.head("grafana")))
    await refused(client.denoise(message(), metadata=(("authorization", "Bearer hsd_wrong"),)))
    lines = [line for line in log_lines() if line["event"] == "call"]
    assert [(line.get("token"), line.get("user")) for line in lines] == [
        ("alice", "ann"), ("grafana", None), (None, None)
    ]  # fmt: skip
    assert not [line for line in log_lines() for secret in [*tenants.secrets, "hsd_wrong"] if secret in str(line)]


async def test_without_tokens_jobs_are_everybodys(start_server: StartServer, tiny_model: Model) -> None:
    """As before: one network address may be many devices, and a device may change its own."""
    client = await start_server()
    asked = message(request_id="fox")
    first = await client.denoise(asked, metadata=((USER_KEY, "ann"),))
    again = await client.denoise(asked)
    assert first[-2].state.arrays == again[-2].state.arrays
    assert again[-1].finished.usage.num_calls == first[-1].finished.usage.num_calls
