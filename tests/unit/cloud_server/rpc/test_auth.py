"""Who calls; over a real connection: tests/faults/cloud/test_tenants.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from cloud_server.engine.caller import Caller
from cloud_server.rpc.auth import caller_of
from hybridsd.tokens import Quota, Token, parse_tokens


def context(peer: str = "ipv4:10.0.0.7:40000", name: str = "") -> Any:
    facts = {"x509_common_name": [name.encode()]} if name else {}
    return SimpleNamespace(peer=lambda: peer, auth_context=lambda: facts)


def test_without_tokens_the_machine_calls() -> None:
    """Its connections are one; its jobs are everybody's."""
    assert caller_of(context(), None, "") == Caller(principal="ipv4:10.0.0.7")
    assert caller_of(context("ipv6:%5B::1%5D:40000"), None, "ann") == Caller(principal="ipv6:%5B::1%5D", user="ann")


def test_a_certificate_stands_for_a_token() -> None:
    """It owns its jobs, by user."""
    device, ann = caller_of(context(name="device-7"), None, ""), caller_of(context(name="device-7"), None, "ann")
    assert (device.principal, ann.principal, ann.user) == ("device-7", "device-7", "ann")
    assert len({device.owner, ann.owner, caller_of(context(name="device-8"), None, "").owner, ""}) == 4


def test_a_token_brings_its_rights() -> None:
    """Whatever certificate it is sent with, or machine it comes from."""
    quota = Quota(jobs=2)
    token = Token(
        name="alice", sha256=bytes(32), scopes=frozenset({"generate", "priority", "admin"}), weight=3.0, quota=quota
    )
    caller = caller_of(context(name="device-7"), token, "ann")
    assert caller == caller_of(context("ipv4:10.0.0.8:1"), token, "ann")
    assert (caller.principal, caller.user, caller.weight, caller.quota) == ("alice", "ann", 3.0, quota)
    assert (caller.has_priority, caller.is_admin) == (True, True)
    plain = caller_of(context(), Token(name="bob", sha256=bytes(32)), "")
    assert (plain.has_priority, plain.is_admin) == (False, False)


@pytest.mark.parametrize("other", ["alice\nx", "token alice", "certificate alice"])
def test_no_name_reads_as_another(other: str) -> None:
    """A certificate cannot be named so that it owns a token's jobs."""
    alice = caller_of(context(), Token(name="alice", sha256=bytes(32)), "x")
    assert caller_of(context(name=other), None, "").owner != alice.owner
    assert caller_of(context(name=other), None, "x").owner != alice.owner


def test_a_line_more_in_a_plain_file_moves_no_job() -> None:
    """Numbers move, owners do not."""
    before, after = parse_tokens("one"), parse_tokens("zero\none")
    assert caller_of(context(), before[0], "").owner == caller_of(context(), after[1], "").owner
