"""Many tenants at one gateway: named tokens, scopes, quotas, and who asks the cloud."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import auth
from hybridsd import tokens as tokens_module
from hybridsd.tokens import Quota, Tokens, add_token, remove_token
from tests.integration.web.conftest import Gate, GatewayServer, finish, serving, submit, wait_for, watching
from tests.support.fake_cloud import FakeCloud
from tests.support.patience import HANG_S


@pytest.fixture(autouse=True)
def _reloads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "RELOAD_S", 0.0)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


class Tenants:
    """A token file, and gateways that use it."""

    def __init__(self, folder: Path, bundle: Bundle, models: Models, cloud: Cloud) -> None:
        self.file, self._folder = folder / "tokens", folder / "data"
        self._parts = (bundle, models, cloud)

    def add(self, name: str, **values: Any) -> str:
        """Makes a token."""
        return add_token(self.file, name, **values)

    @contextmanager
    def serve(
        self, tokens: Mapping[str, str], **settings: Any
    ) -> Iterator[tuple[GatewayServer, dict[str, httpx.Client]]]:
        """Runs a gateway; yields it with a client of each token."""
        with (
            serving(self._folder, *self._parts, tokens=Tokens(self.file), **settings) as server,
            ExitStack() as stack,
        ):
            yield (
                server,
                {name: stack.enter_context(server.client(headers=bearer(token))) for name, token in tokens.items()},
            )


@pytest.fixture
def tenants(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> Tenants:
    return Tenants(tmp_path, bundle, models, cloud)


def refusal(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """Returns the problem of a refused request."""
    said: dict[str, Any] = response.json()
    assert (response.status_code, said["reason"]) == (status, reason), response.text
    return said


def test_tokens_come_and_go_without_a_restart(tenants: Tenants) -> None:
    """A new token is good at once, a removed one is not; an expired one is refused with words; a file that cannot be
    read changes nothing.
    """
    tokens = {"alice": tenants.add("alice")}
    with tenants.serve(tokens) as (server, clients):
        job = finish(clients["alice"])
        bob = server.client(headers=bearer(tenants.add("bob")))
        with bob:
            assert bob.get("/v1/me").json()["owner"] == "bob"
            remove_token(tenants.file, "bob")
            refusal(bob.get("/v1/me"), 401, "UNAUTHENTICATED")
        old = tenants.add("old", expires=datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
        with server.client(headers=bearer(old)) as late:
            said = refusal(late.get("/v1/jobs"), 401, "UNAUTHENTICATED")
        assert "'old' expired at 2026-01-02 03:04" in said["detail"]

        whole = tenants.file.read_text()
        tenants.file.write_text("[broken")
        assert clients["alice"].get("/v1/me").status_code == 200
        tenants.file.write_text(whole)

        remove_token(tenants.file, "alice")
        again = tenants.add("alice")  # a new secret, the same name
        refusal(clients["alice"].get("/v1/jobs"), 401, "UNAUTHENTICATED")
        with server.client(headers=bearer(again)) as alice:
            assert [each["id"] for each in alice.get("/v1/jobs").json()["jobs"]] == [job["id"]]
            assert alice.get(f"/v1/jobs/{job['id']}").json()["owner"] == "alice"


def test_scopes(tenants: Tenants, gate: Gate) -> None:
    """Each surface refuses what the token may not, with the scope's name; an admin sees and stops all jobs."""
    names = {"alice": {"generate"}, "bob": {"generate"}, "watch": {"metrics"}, "root": {"admin"}}
    tokens = {name: tenants.add(name, scopes=frozenset(scopes)) for name, scopes in names.items()}
    with tenants.serve(tokens, workers=1) as (_, clients):
        alice, bob, watch, root = (clients[name] for name in names)
        done = finish(alice)
        gate.close()
        running = submit(alice)
        gate.wait()
        waiting = submit(alice)

        bodies = {
            "/v1/jobs": {"prompt": "a fox"}, "/v1/images/generations": {"prompt": "a fox"},
            "/sdapi/v1/txt2img": {"prompt": "a fox"},
        }  # fmt: skip
        for client in (watch, root):
            for path, body in bodies.items():
                assert "'generate'" in refusal(client.post(path, json=body), 403, "PERMISSION_DENIED")["detail"]
        image = done["images"][0]["url"]
        for path in ("/v1/jobs", f"/v1/jobs/{done['id']}", image.partition("?")[0], f"/v1/jobs/{done['id']}/events"):
            assert "'generate' or 'admin'" in refusal(watch.get(path), 403, "PERMISSION_DENIED")["detail"]
        assert watch.get(image).status_code == 200  # its address is signed, and gives access by itself
        assert watch.get("/v1/me").json()["scopes"] == ["metrics"]

        for path in (f"/v1/jobs/{waiting['id']}", f"/v1/jobs/{waiting['id']}/events"):
            refusal(bob.get(path), 404, "NOT_FOUND")
        refusal(bob.post(f"/v1/jobs/{waiting['id']}/cancel"), 404, "NOT_FOUND")
        refusal(bob.delete(f"/v1/jobs/{done['id']}"), 404, "NOT_FOUND")
        assert "'admin'" in refusal(bob.get("/v1/jobs?owner=alice"), 403, "PERMISSION_DENIED")["detail"]
        assert "'admin'" in refusal(bob.get("/v1/jobs?owner=*"), 403, "PERMISSION_DENIED")["detail"]
        assert bob.get("/v1/jobs?owner=bob").json()["jobs"] == []

        for whose in ("alice", "*"):
            seen = root.get("/v1/jobs", params={"owner": whose}).json()["jobs"]
            assert [each["id"] for each in seen] == [waiting["id"], running["id"], done["id"]]
            assert {each["owner"] for each in seen} == {"alice"}
        assert root.get("/v1/jobs").json()["jobs"] == []  # its own
        assert root.post(f"/v1/jobs/{waiting['id']}/cancel").json()["state"] == "cancelled"
        with watching(root, running["id"]) as events:
            assert next(events).name == "queued"
        assert root.get(image.partition("?")[0]).status_code == 200
        assert root.delete(f"/v1/jobs/{done['id']}").status_code == 204
        refusal(alice.get(f"/v1/jobs/{done['id']}"), 410, "JOB_GONE")
        root.post(f"/v1/jobs/{running['id']}/cancel")
        gate.open()
        assert wait_for(alice, running["id"]).name == "cancelled"


def test_steps_a_minute(tenants: Tenants, gate: Gate) -> None:
    """All images count. A refusal names the limit, says when to come again, and that is when there is room; what a
    cancelled job did not use comes back; what never fits is said at once.
    """
    tokens = {"alice": tenants.add("alice", quota=Quota(steps_per_minute=20)), "bob": tenants.add("bob")}
    with tenants.serve(tokens, workers=1) as (_, clients):
        alice = clients["alice"]
        gate.close()
        first = submit(clients["bob"])
        gate.wait()
        job = submit(alice, n=3)  # 18 steps
        body = {"prompt": "a fox", "scheduler": "ddim", "num_inference_steps": 6}
        response = alice.post("/v1/jobs", json=body)
        said = refusal(response, 429, "QUOTA_EXCEEDED")
        delay_s = int(response.headers["retry-after"])
        assert "needs 6 steps" in said["detail"]
        assert "steps_per_minute" in said["detail"]
        assert (said["retry_delay_s"], f"in {delay_s} s" in said["detail"]) == (delay_s, True)
        assert 6 <= delay_s <= 16  # 4 steps are missing, 20 come in a minute, and jitter adds a quarter at most
        too_many = alice.post(
            "/v1/jobs", json={"prompt": "a fox", "scheduler": "ddim", "num_inference_steps": 6, "n": 4}
        )
        assert "20 a minute" in refusal(too_many, 422, "STEPS_INVALID")["detail"]

        used = alice.get("/v1/me").json()["quotas"]
        assert used == {"steps_per_minute": {"limit": 20, "used": used["steps_per_minute"]["used"]}}
        assert used["steps_per_minute"]["used"] > 10
        alice.post(f"/v1/jobs/{job['id']}/cancel")
        assert alice.get("/v1/me").json()["quotas"]["steps_per_minute"]["used"] == 0
        again = submit(alice, n=3)
        gate.open()
        assert {wait_for(alice, again["id"]).name, wait_for(clients["bob"], first["id"]).name} == {"completed"}


def test_jobs_and_pixels_of_a_token(tenants: Tenants, gate: Gate) -> None:
    """So many run at once though workers are free, so many wait; an image that is too large is refused at once."""
    tokens = {
        "alice": tenants.add("alice", quota=Quota(jobs=1, queued=1, pixels=1024)),
        "none": tenants.add("none", quota=Quota(queued=0)),
        "bob": tenants.add("bob"),
    }
    with tenants.serve(tokens, workers=3) as (server, clients):
        alice, bob = clients["alice"], clients["bob"]
        gate.close()
        said = refusal(alice.post("/v1/jobs", json={"prompt": "a", "width": 64, "height": 32}), 422, "SIZE_INVALID")
        assert "at most 1024" in said["detail"]
        jobs = [submit(alice) for _ in range(2)]
        gate.wait()
        response = alice.post("/v1/jobs", json={"prompt": "a fox"})
        assert "allows 1 (its limit queued)" in refusal(response, 429, "QUOTA_EXCEEDED")["detail"]
        assert int(response.headers["retry-after"]) >= 1
        others = [submit(bob), submit(clients["none"])]  # which begins at once, and so does not wait
        gate.wait(3)
        refusal(clients["none"].post("/v1/jobs", json={"prompt": "a fox"}), 429, "QUOTA_EXCEEDED")
        assert server.gateway.queue.load == {"num_running": 3, "num_waiting": 1}
        assert alice.get("/v1/me").json()["quotas"] == {
            "jobs": {"limit": 1, "used": 1}, "queued": {"limit": 1, "used": 1}, "pixels": {"limit": 1024, "used": None},
        }  # fmt: skip
        gate.open()
        assert {wait_for(alice, job["id"]).name for job in jobs} == {"completed"}
        assert wait_for(bob, others[0]["id"]).name == "completed"


def test_bytes_of_a_token(tenants: Tenants) -> None:
    """Its own oldest jobs go; the last one stays."""
    tokens = {"alice": tenants.add("alice", quota=Quota(bytes=1)), "bob": tenants.add("bob")}
    with tenants.serve(tokens) as (_, clients):
        other, first, last = finish(clients["bob"]), finish(clients["alice"]), finish(clients["alice"])
        assert [each["id"] for each in clients["alice"].get("/v1/jobs").json()["jobs"]] == [last["id"]]
        refusal(clients["alice"].get(f"/v1/jobs/{first['id']}"), 410, "JOB_GONE")
        assert clients["bob"].get(other["images"][0]["url"]).status_code == 200
        used = clients["alice"].get("/v1/me").json()["quotas"]["bytes"]
        assert used["used"] > used["limit"] == 1


def test_other_apis_refuse_in_their_words(tenants: Tenants) -> None:
    """OpenAI's code and headers; AUTOMATIC1111's `detail`."""
    tokens = {"alice": tenants.add("alice", quota=Quota(steps_per_minute=8, pixels=1024))}
    body = {"prompt": "a fox", "scheduler": "ddim", "num_inference_steps": 6, "size": "32x32"}
    with tenants.serve(tokens) as (_, clients):
        alice = clients["alice"]
        drawn = alice.post("/v1/images/generations", json=body)
        refused = alice.post("/v1/images/generations", json=body)
        assert drawn.status_code == 200
        assert (drawn.headers["x-ratelimit-limit-steps"], drawn.headers["x-ratelimit-remaining-steps"]) == ("8", "2")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["x-ratelimit-reset-steps"].removesuffix("s")) >= 1

        task = {"prompt": "a fox", "steps": 6, "sampler_name": "DDIM", "width": 32, "height": 32}
        said = refusal(alice.post("/sdapi/v1/txt2img", json=task), 429, "QUOTA_EXCEEDED")
        assert "come again in" in said["detail"]
        large = refusal(alice.post("/sdapi/v1/txt2img", json={**task, "width": 64}), 422, "SIZE_INVALID")
        assert "width 64" in large["detail"]


def test_the_cloud_is_told_for_whom(tenants: Tenants, fake: FakeCloud, gate: Gate) -> None:
    """Two tokens are two users, also after a broken stream, in a cancel, and after a restart of the gateway; what it is
    told is no token and no name, and is in no image.
    """
    tokens = {name: tenants.add(name) for name in ("alice", "bob")}

    def user_of(job: Mapping[str, Any], begin: int) -> str:
        (user,) = {user for call, _, user in fake.users[begin:] if call == "Denoise"}
        assert job["state"] == "completed"
        return user

    users = []
    with tenants.serve(tokens) as (_, clients):
        for client in clients.values():
            begin = len(fake.users)
            fake.die_after_call, fake.die_times = 1, 1
            done = finish(client)
            assert len(fake.users) - begin >= 2  # it was attached again
            users.append(user_of(done, begin))
            said = client.get(done["images"][0]["url"]).content + json.dumps(done).encode()
            assert users[-1].encode() not in said
        begin = len(fake.users)
        gate.close()
        job = submit(clients["bob"])
        gate.wait()
        clients["bob"].post(f"/v1/jobs/{job['id']}/cancel")
        assert fake.cancel_seen.wait(HANG_S)
        gate.open()
        wait_for(clients["bob"], job["id"])
        assert {user for _, _, user in fake.users[begin:]} == {users[1]}
        assert "CancelDenoise" in {call for call, _, _ in fake.users[begin:]}
    with tenants.serve(tokens) as (_, clients):
        begin = len(fake.users)
        assert user_of(finish(clients["alice"]), begin) == users[0]

    assert users[0] != users[1]
    for user in users:
        assert len(bytes.fromhex(user)) == 8


def test_addresses_share_an_open_gateway(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate, fake: FakeCloud
) -> None:
    """A proxy that is trusted says which; one address fills the queue, and another's first job finds room."""
    settings: dict[str, Any] = {"max_queue": 3, "workers": 1, "trusted_proxies": ["127.0.0.0/8"]}
    with serving(tmp_path, bundle, models, cloud, **settings) as server:
        one, two, near = (
            server.client(headers={"x-forwarded-for": f"6.6.6.6, {address}"})
            for address in ("2001:db8::1", "203.0.113.7", "2001:db8::2")
        )
        with one, two, near:
            gate.close()
            running = submit(one)
            gate.wait()
            flood = [submit(one, n=4) for _ in range(3)]
            refusal(one.post("/v1/jobs", json={"prompt": "a fox"}), 429, "TOO_MANY_JOBS")
            refusal(near.post("/v1/jobs", json={"prompt": "a fox"}), 429, "TOO_MANY_JOBS")  # one may choose 64 bits
            job = submit(two)
            assert job["queue_position"] == 0
            for each in (*flood, job):
                one.post(f"/v1/jobs/{each['id']}/cancel")  # without tokens, jobs are everybody's
            gate.open()
            assert wait_for(one, running["id"]).name == "completed"
            assert finish(two)["state"] == "completed"
    assert len({user for _, _, user in fake.users}) == 2


def test_a_stranger_is_not_believed_whom_he_speaks_for(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """X-Forwarded-For of anybody but a trusted proxy says nothing, also from this machine."""
    with serving(tmp_path, bundle, models, cloud) as server:
        for address in ("203.0.113.1", "203.0.113.2"):
            with server.client(headers={"x-forwarded-for": address}) as client:
                finish(client)
    assert len(fake.users) == 2
    assert len({user for _, _, user in fake.users}) == 1


def test_a_plain_token_has_the_owner_that_it_had(tmp_path: Path) -> None:
    """So that data folders of older gateways stay good."""
    file = tmp_path / "tokens"
    file.write_text("# two\none-token\ntwo-token\n")
    access = auth.Access(Tokens(file), b"secret")
    request = auth.Request({"type": "http", "headers": [(b"authorization", b"Bearer one-token")]})

    assert access.caller(request).owner == "430cc2c1809f5127"
    assert access.require(request, "metrics").scopes == {"generate", "metrics"}


def test_pixels_are_those_of_the_image_that_is_kept(tenants: Tenants) -> None:
    """A small image that is made large afterwards is a large one."""
    tokens = {"alice": tenants.add("alice", quota=Quota(pixels=10_000))}
    with tenants.serve(tokens) as (_, clients):
        body = {"prompt": "a fox", "width": 1000, "height": 1000, "fit_size": True}
        said = refusal(clients["alice"].post("/v1/jobs", json=body), 422, "SIZE_INVALID")
    assert "1000000 pixels" in said["detail"]
