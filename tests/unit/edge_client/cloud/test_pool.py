"""Which cloud of several is asked: load, memory, models, names with several addresses."""

import itertools
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud import names as names_module
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import MAX_SERVERS, OLD_S, RESOLVE_S, Member, Pool, Wanted
from edge_client.cloud.types import Capabilities, CloudModel
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.patience import HANG_S

MODEL = CloudModel(
    id="large", latent_space="sd", prediction_type="epsilon", num_parameters=1, default_size=512, schedulers=()
)
FREE = Capabilities(server_version="1", models=(MODEL,), bundles={}, num_running=0, num_queued=0, call_s=0.1)
ANYTHING = Wanted()
BUSY = replace(FREE, num_queued=20)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stub:
    """A cloud that answers at once what it is told to."""

    def __init__(self, target: str, found: Capabilities | HybridSDError) -> None:
        self.target, self.found = target, found
        self.away: str | None = None
        self.num_asked = 0
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()

    def capabilities(self) -> Capabilities:
        self.num_asked += 1
        assert self.gate.wait(HANG_S)
        if isinstance(self.found, HybridSDError):
            raise self.found
        return self.found

    def renew(self) -> None:
        """Has no connection."""

    def close(self) -> None:
        self.closed = True
        self.gate.set()


def pool_of(*found: Capabilities | HybridSDError, clock: Clock | None = None) -> tuple[Pool, list[Stub]]:
    stubs = {f"10.0.0.{i}:1": Stub(f"10.0.0.{i}:1", each) for i, each in enumerate(found)}
    pool = Pool(list(stubs), lambda target, _: stubs[target], clock=clock or Clock())  # type: ignore[arg-type, return-value]
    return pool, list(stubs.values())


def chosen(pool: Pool, wanted: Wanted = ANYTHING, **options: object) -> str | None:
    member = pool.choose(wanted, **options)  # type: ignore[arg-type]
    return None if member is None else member.target


def know(pool: Pool) -> None:
    """Has all asked and answered."""
    pool.ask_all(HANG_S)


def test_least_loaded_is_chosen() -> None:
    """As the clouds say: how long a job would wait, else how many are before it."""
    pool, stubs = pool_of(BUSY, FREE, BUSY)
    know(pool)
    assert chosen(pool) == stubs[1].target
    says, stubs = pool_of(replace(FREE, wait_s=9.0), replace(BUSY, wait_s=0.0, num_queued=0, num_running=1))
    know(says)
    assert chosen(says) == stubs[1].target


def test_a_job_more_counts_where_calls_are_short() -> None:
    """A cloud whose steps take 50 ms and who runs one job is not as good as an idle one."""
    idle = replace(FREE, call_s=0.05, num_running=0)
    pool, stubs = pool_of(replace(idle, num_running=1), idle)
    know(pool)
    assert {chosen(pool) for _ in range(20)} == {stubs[1].target}


def test_own_jobs_count_before_the_cloud_says_so() -> None:
    """Many images begun at once spread over all, though the answers are the old ones."""
    pool, _ = pool_of(FREE, FREE, FREE)
    know(pool)
    begun = Counter[str]()
    for _ in range(9):
        member = pool.choose(Wanted())
        assert member is not None
        member.begin()
        begun[member.target] += 1
    assert sorted(begun.values()) == [3, 3, 3]


def test_begun_jobs_are_forgotten_where_nobody_asks() -> None:
    """An only cloud is not asked for its load: what was begun there must not be kept for ever."""
    clock = Clock()
    pool, _ = pool_of(FREE, clock=clock)
    pool.capabilities()
    (only,) = pool.members()
    only.begin()
    one_s = only.load_s(20)
    for _ in range(50):
        clock.now += OLD_S
        only.begin()
    assert only.load_s(20) == one_s


def test_chance_decides_between_equals() -> None:
    """Many edges that know the same do not all go to the first."""
    pool, _ = pool_of(FREE, FREE, FREE)
    know(pool)
    assert len({chosen(pool) for _ in range(200)}) == 3


def test_choice_does_not_wait_where_one_is_known() -> None:
    """A cloud that is silent about itself delays nobody, and is asked once."""
    clock = Clock()
    pool, stubs = pool_of(FREE, FREE, clock=clock)
    know(pool)
    for stub in stubs:
        stub.gate.clear()
    clock.now += OLD_S / 2
    asked = [stub.num_asked for stub in stubs]
    for _ in range(5):
        assert chosen(pool) is not None
    assert all(stub.num_asked <= before + 1 for stub, before in zip(stubs, asked, strict=True))
    pool.close()


def test_who_does_not_answer_is_chosen_last() -> None:
    pool, stubs = pool_of(FREE, BUSY)
    stubs[0].gate.clear()
    assert chosen(pool) == stubs[1].target
    pool.close()


def test_bad_ones_rest_longer_each_time_and_come_back() -> None:
    """The memory decays, and one that gets on is as good as new."""
    clock = Clock()
    pool, stubs = pool_of(FREE, BUSY, clock=clock)
    know(pool)
    bad = pool.members()[0]
    lied = Reason.INTERNAL.error("it lied")
    rests = []
    for _ in range(3):
        pool.failed(bad, lied)
        rests.append(bad.rests_s)
        assert chosen(pool) == stubs[1].target
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(rests))
    clock.now += rests[-1] + 0.01
    know(pool)
    assert chosen(pool) == stubs[0].target
    pool.failed(bad, lied)
    bad.got_on()
    assert bad.rests_s == 0


def test_full_one_rests_for_as_long_as_it_says() -> None:
    clock = Clock()
    pool, stubs = pool_of(FREE, BUSY, clock=clock)
    know(pool)
    pool.failed(pool.members()[0], Reason.QUEUE_FULL.error("full", retry_delay_s=7.0))
    assert 7.0 <= pool.members()[0].rests_s < 9.0
    assert chosen(pool) == stubs[1].target


def test_unreachable_one_is_back_when_it_answers() -> None:
    """Who refused connections and now answers has come back; who lied has not."""
    pool, _ = pool_of(FREE, FREE)
    know(pool)
    gone, liar = pool.members()
    pool.failed(gone, Reason.UNAVAILABLE.error("refuses connections"))
    pool.failed(liar, Reason.INTERNAL.error("it lied"))
    know(pool)
    assert gone.rests_s == 0 < liar.rests_s


def test_all_resting_the_first_to_be_ready_is_asked() -> None:
    pool, stubs = pool_of(FREE, FREE)
    know(pool)
    for member, delay_s in zip(pool.members(), (9.0, 5.0), strict=True):
        pool.failed(member, Reason.QUEUE_FULL.error("full", retry_delay_s=delay_s))
    assert chosen(pool) == stubs[1].target


def test_only_who_serves_it_is_chosen() -> None:
    other = replace(MODEL, id="other", latent_space="xl", loras=("ink",))
    pool, stubs = pool_of(FREE, replace(BUSY, models=(other, MODEL), max_size=256))
    know(pool)
    assert chosen(pool, Wanted(models=("other",))) == stubs[1].target
    assert chosen(pool, Wanted(models=("other",), loras=("ink",))) == stubs[1].target
    assert chosen(pool, Wanted(width=512)) == stubs[0].target
    assert chosen(pool, Wanted(latent_space="sd")) == stubs[0].target
    assert chosen(pool, Wanted(models=("nobody's",))) == stubs[0].target  # so that it says so
    assert chosen(pool, Wanted(models=("nobody's",)), without=[pool.members()[0]]) is None


def test_away_ones_are_not_chosen() -> None:
    """A breaker that is tripped keeps jobs away; with all of them away, none is chosen and the pool says why."""
    pool, stubs = pool_of(FREE, BUSY)
    know(pool)
    stubs[0].away = "silent of late"
    assert chosen(pool) == stubs[1].target
    assert pool.away is None
    stubs[1].away = "silent as well"
    assert chosen(pool) is None
    assert "silent of late" in pool.refusal().message


def test_capabilities_are_those_of_all_together() -> None:
    ink = replace(MODEL, loras=("ink",))
    other = replace(MODEL, id="other")
    pool, _ = pool_of(
        replace(FREE, num_running=2, max_batch=4, min_size=64, max_size=512),
        Reason.UNAVAILABLE.error("away"),
        replace(FREE, models=(other, ink), num_running=3, max_batch=8, min_size=128, max_size=1024),
    )
    found = pool.capabilities()
    assert [(model.id, model.loras) for model in found.models] == [("large", ("ink",)), ("other", ())]
    assert (found.num_running, found.max_batch, found.min_size, found.max_size) == (5, 12, 64, 1024)
    assert [member.error is None for member in pool.members()] == [True, False, True]


def test_nobody_answers() -> None:
    pool, _ = pool_of(Reason.UNAVAILABLE.error("away"), Reason.UNAVAILABLE.error("away"))
    with pytest.raises(HybridSDError, match="away"):
        pool.capabilities()


@pytest.mark.parametrize("targets", [[], [f"10.0.0.{i}:1" for i in range(MAX_SERVERS + 1)]])
def test_number_of_servers_is_bounded(targets: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=str(MAX_SERVERS)):
        Pool(targets, lambda target, _: Stub(target, FREE))  # type: ignore[arg-type, return-value]


class Names:
    """A name service."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[str, ...] | None = addresses
        self.num_asked = 0

    def __call__(self, host: str, port: int) -> tuple[str, ...]:
        self.num_asked += 1
        if self.addresses is None:
            raise OSError("no such name")
        return self.addresses


Made = list[tuple[str, str | None, Stub]]


def named(names: Names, clock: Clock) -> tuple[Pool, Made]:
    made: Made = []

    def connect(target: str, address: str | None) -> Stub:
        made.append((target, address, Stub(f"{target} ({address})", FREE)))
        return made[-1][2]

    return Pool(["clouds.lan:50051"], connect, resolve=names, clock=clock), made  # type: ignore[arg-type]


def again(pool: Pool, names: Names, until: Callable[[], bool]) -> None:
    """Lets the name be resolved beside the work."""
    waited = threading.Event()
    for _ in range(500):
        pool.members()
        if until():
            return
        waited.wait(0.01)
    raise AssertionError("nothing has changed")


def test_name_with_several_addresses_is_several_clouds() -> None:
    """Each is one; who goes on keeps what is known, who is gone is closed, and the name is asked again in time."""
    clock, names = Clock(), Names("10.0.0.1", "fd00::2")
    pool, made = named(names, clock)
    first = pool.members()
    assert [member.target for member in first] == ["clouds.lan:50051 (10.0.0.1)", "clouds.lan:50051 (fd00::2)"]
    assert pool.members() == first
    assert names.num_asked == 1
    names.addresses = ("fd00::2", "10.0.0.3")
    clock.now += RESOLVE_S + 1
    again(pool, names, lambda: first[0] not in pool.members())
    for thread in threading.enumerate():
        if thread.name == "hybridsd-names":
            thread.join(HANG_S)
    assert not made[1][2].closed  # a job may have chosen it just before
    assert pool.members()[0] is first[1]
    clock.now += RESOLVE_S + 1
    again(pool, names, lambda: made[1][2].closed)  # that of the first address
    assert not made[2][2].closed


def test_failure_has_the_name_resolved_again() -> None:
    clock, names = Clock(), Names("10.0.0.1", "10.0.0.2")
    pool, _ = named(names, clock)
    before = pool.members()
    names.addresses = ("10.0.0.2", "10.0.0.3")
    clock.now += 3
    assert pool.members() == before
    pool.failed(before[0], Reason.UNAVAILABLE.error("gone"))
    again(pool, names, lambda: pool.members()[0] is before[1])


@pytest.mark.parametrize("addresses", [("10.0.0.1",), None])
def test_name_with_one_address_or_none_is_left_to_grpc(addresses: tuple[str, ...] | None) -> None:
    names = Names()
    names.addresses = addresses
    pool, made = named(names, Clock())
    assert len(pool.members()) == 1
    assert [(target, address) for target, address, _ in made] == [("clouds.lan:50051", None)]


def test_addresses_and_this_machine_are_not_resolved() -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    pool = Pool(
        ["localhost:1", "[::1]:2", "10.1.1.1:3"],
        lambda target, _: Stub(target, FREE),  # type: ignore[arg-type, return-value]
        resolve=names,
    )
    assert [member.target for member in pool.members()] == ["localhost:1", "[::1]:2", "10.1.1.1:3"]
    assert names.num_asked == 0


def test_system_says_each_address_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(2, 0, 0, "", (address, 1)) for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2")]
    monkeypatch.setattr(names_module.socket, "getaddrinfo", lambda *_args, **_options: answers)
    assert names_module.find_addresses("clouds.lan", 1) == ("10.0.0.1", "10.0.0.2")


def test_host_with_both_families_is_one_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would count twice, and be away for ever by the one that this machine has no way to."""
    answers = [(10, 0, 0, "", ("2001:db8::1", 1, 0, 0)), (2, 0, 0, "", ("10.0.0.1", 1))]
    monkeypatch.setattr(names_module.socket, "getaddrinfo", lambda *_args, **_options: answers)
    assert names_module.find_addresses("cloud.lan", 1) == ("2001:db8::1",)
    pool = Pool(["cloud.lan:50051"], lambda target, _: Stub(target, FREE))  # type: ignore[arg-type, return-value]
    assert [member.target for member in pool.members()] == ["cloud.lan:50051"]  # gRPC tries both


@pytest.fixture
def fakes() -> Iterator[list[Running]]:
    served = [serve(FakeCloud()), serve(FakeCloud())]
    yield served
    for each in served:
        each.fake.released.set()
        each.server.stop(grace=None).wait()


def test_member_of_a_name_is_really_asked_at_its_address(tmp_path: Path, fakes: list[Running]) -> None:
    """The host stays the name: what the certificate is checked against, and what the server is asked by."""
    port = int(fakes[0].target.rpartition(":")[2])
    with Cloud(f"clouds.invalid:{port}", address="127.0.0.1", insecure=True, cache=Cache(tmp_path / "cache")) as cloud:
        assert cloud.capabilities().models[0].id == "fake-large"
        assert cloud.target == f"clouds.invalid:{port} (127.0.0.1)"


def test_pool_of_one_is_its_cloud(tmp_path: Path, fakes: list[Running]) -> None:
    with ExitStack() as stack:
        cloud = stack.enter_context(Cloud(fakes[0].target, cache=Cache(tmp_path / "cache")))
        pool = Pool.of(cloud)
        assert Pool.of(pool) is pool
        (member,) = pool.members()
        assert isinstance(member, Member)
        assert pool.choose(Wanted(models=("unknown",))) is member
        assert pool.choose(Wanted(), without=[member]) is None
        assert pool.target == cloud.target
        pool.away = "not now"
        assert cloud.away == "not now"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_certificate_is_that_of_the_name(tmp_path: Path) -> None:
    """A cloud at one address of a name is trusted as the name, and not as another."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", "its.key", "-out", "its.pem", "-days", "2", "-subj", "/CN=clouds.test",
         "-addext", "subjectAltName=DNS:clouds.test"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    pair = ((tmp_path / "its.key").read_bytes(), (tmp_path / "its.pem").read_bytes())
    running = serve(FakeCloud(), grpc.ssl_server_credentials([pair]))
    port = running.target.rpartition(":")[2]
    options: dict[str, Any] = {"address": "127.0.0.1", "tls_ca": tmp_path / "its.pem", "cache": Cache(tmp_path)}
    try:
        with Cloud(f"clouds.test:{port}", **options) as cloud:
            assert cloud.capabilities().models
        with Cloud(f"others.test:{port}", **options) as cloud, pytest.raises(HybridSDError, match=r"others\.test"):
            cloud.capabilities()
    finally:
        running.server.stop(grace=None).wait()


def test_one_address_of_a_name_stands_in_for_another(
    tmp_path: Path, fakes: list[Running], bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at the first address; the image is drawn by who does at the second."""
    port = fakes[0].target.rpartition(":")[2]
    answers = [(0, 0, 0, "", (address, 1)) for address in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(names_module.socket, "getaddrinfo", lambda *_args, **_options: answers)
    cache = Cache(tmp_path / "cache")

    def connect(target: str, address: str | None) -> Cloud:
        return Cloud(target, address=address, insecure=True, cache=cache)

    with Pool([f"clouds.invalid:{port}"], connect) as pool:
        request = Request(prompt="a red fox", mode="hybrid", seed=11, cloud_steps=3)
        *_, last = generate(resolve(request, bundle.manifest), bundle, models, pool)
        assert isinstance(last, Finished)
        assert last.result.actual_cloud_steps == 3
        assert last.result.clouds[-1].server == f"clouds.invalid:{port} (127.0.0.1)"
        assert len(pool.members()) == 2
