"""The token file of cloud and gateway."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hybridsd import tokens
from hybridsd.tokens import (
    Quota,
    Tokens,
    add_token,
    hash_token,
    list_tokens,
    parse_expiry,
    parse_tokens,
    remove_token,
    warn_of_readers,
)

DIGEST = "ab" * 32


def change(path: Path, text: str) -> None:
    """Writes a file so that it is seen to have changed, however coarse the clock of the file system is."""
    path.write_text(text)
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))


def test_a_token_is_made_found_and_removed(tmp_path: Path) -> None:
    path, until = tmp_path / "tokens.toml", datetime(2127, 1, 31, tzinfo=UTC)
    secret = add_token(
        path,
        "alice",
        scopes=frozenset({"generate", "priority"}),
        expires=until,
        weight=2.5,
        quota=Quota(jobs=4, pixels=9),
    )
    other = add_token(path, "bob")
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    found = Tokens(path)
    alice, bob = found.find(secret), found.find(other)
    assert alice is not None
    assert bob is not None
    assert (alice.name, alice.scopes, alice.weight) == ("alice", {"generate", "priority"}, 2.5)
    assert (alice.expires, alice.quota) == (until, Quota(jobs=4, pixels=9))
    assert (bob.name, bob.scopes, bob.expires, bob.quota) == ("bob", {"generate"}, None, Quota())
    assert not alice.has_expired()
    assert alice.has_expired(until)
    assert found.find("hsd_guess") is None
    remove_token(path, "alice")
    assert [token.name for token in Tokens(path).all] == ["bob"]
    with pytest.raises(ValueError, match="'carol'"):
        remove_token(path, "carol")
    with pytest.raises(ValueError, match="'bob' already"):
        add_token(path, "bob")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no tokens"),
        ("# nothing\n", "no tokens"),
        ("tok\u00e9n", "printable ASCII"),
        ("[a]\n", "sha256"),
        (f"[a]\nsha256='{DIGEST[:-1]}g'", "sha256"),
        (f"[a]\nsha256='{DIGEST}'\nscopes='generate'", "generate, priority"),
        (f"[a]\nsha256='{DIGEST}'\nscopes=['root']", "'root'"),
        (f"[a]\nsha256='{DIGEST}'\nexpires='2027'", "2027-01-31"),
        (f"[a]\nsha256='{DIGEST}'\nweight=0", "above 0"),
        (f"[a]\nsha256='{DIGEST}'\nweight=true", "above 0"),
        (f"[a]\nsha256='{DIGEST}'\n[a.quota]\njobs=-1", "jobs"),
        (f"[a]\nsha256='{DIGEST}'\n[a.quota]\nspeed=1", "speed"),
        (f"[a]\nsha256='{DIGEST}'\nname='x'", "'name'"),
        (f"[a]\nsha256='{DIGEST}'\n[b]\nsha256='{DIGEST}'", "two names"),
        (f"['a b']\nsha256='{DIGEST}'", "'a b'"),
        ("[a", "TOML"),
        (f"sha256 = '{DIGEST}'", "outside of a table"),
        (f"[a]\nsha256='{DIGEST}'\n[a.quota]\njobs=0", "from 1 on"),
        (f"[a]\nsha256='{DIGEST}'\n[a.quota]\npixels={10**30}", "pixels"),
        ("[a]\nx=" + "9" * 5000, "TOML"),
    ],
)  # fmt: skip
def test_a_wrong_file_says_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_tokens(text)


def test_a_plain_file_is_a_list_of_tokens() -> None:
    found = parse_tokens("# of the office\nsecret one\n\nsecret-two\nsecret-two\n")
    assert [(token.name, token.sha256) for token in found] == [
        ("token-1", hash_token("secret one")), ("token-2", hash_token("secret-two"))
    ]  # fmt: skip


def test_a_changed_file_counts_and_a_broken_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "RELOAD_S", 0.0)
    path, said = tmp_path / "tokens", []
    path.write_text("one")
    found = Tokens(path, on_reload=said.append)
    change(path, "two, longer")
    assert found.find("one") is None
    assert found.find("two, longer") is not None
    change(path, "[broken")
    assert found.find("two, longer") is not None
    path.unlink()
    assert found.find("two, longer") is not None
    change(path, "one")
    assert found.find("one") is not None
    assert [wrong is None for wrong in said] == [True, False, False, True]


def test_an_expiry_without_a_zone_is_utc() -> None:
    (token,) = parse_tokens(f"[a]\nsha256='{DIGEST}'\nexpires=2027-01-31T00:00:00")
    assert token.expires == datetime(2027, 1, 31, tzinfo=UTC)
    assert not token.has_expired(token.expires - timedelta(seconds=1))


def test_a_plain_token_owns_by_itself_and_a_named_one_by_its_name() -> None:
    """A line more in a plain file moves no job to another token; a named token can be changed for another."""
    before, after = parse_tokens("one\ntwo"), parse_tokens("zero\none\ntwo")
    assert [token.owner for token in before] == [token.owner for token in after][1:]
    assert len({token.owner for token in after}) == 3
    assert [token.owner for token in parse_tokens(f"[a]\nsha256='{DIGEST}'")] == ["a"]


def test_the_last_token_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not good any more, also where the file was read before."""
    monkeypatch.setattr(tokens, "RELOAD_S", 0.0)
    path, said = tmp_path / "tokens", []
    secret = add_token(path, "alice")
    found = Tokens(path, on_reload=said.append)
    remove_token(path, "alice")
    assert found.find(secret) is None
    assert said == [None]
    add_token(path, "alice")
    assert [token.name for token in found.all] == ["alice"]


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a]\n[b", "x" * 65])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="the name"):
        add_token(tmp_path / "tokens", name)
    assert not (tmp_path / "tokens").exists()


def test_a_file_keeps_its_rights_and_a_link_its_target(tmp_path: Path) -> None:
    path, link = tmp_path / "tokens", tmp_path / "link"
    add_token(path, "alice")
    path.chmod(0o640)
    link.symlink_to(path)
    add_token(link, "bob")
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [token.name for token in Tokens(path).all] == ["alice", "bob"]
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_what_the_system_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot change"):
        add_token(tmp_path / "none" / "tokens", "alice")


NOW = datetime(2026, 12, 1, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("never", None),
        ("90d", datetime(2027, 3, 1, 10, tzinfo=UTC)),
        ("30m", datetime(2026, 12, 1, 10, 30, tzinfo=UTC)),
        ("2w", datetime(2026, 12, 15, 10, tzinfo=UTC)),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T02:00:00+02:00", datetime(2027, 1, 31, tzinfo=UTC)),
    ],
)
def test_an_expiry(text: str, until: datetime | None) -> None:
    assert parse_expiry(text, now=NOW) == until


@pytest.mark.parametrize("text", ["", "90", "90y", "-1d", "soon", "999999w", "2026-11-30", "0d"])
def test_an_expiry_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="give a"):
        parse_expiry(text, now=NOW)


def test_a_list_has_names_and_limits_and_no_secrets(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    secret = add_token(path, "alice", expires=NOW, weight=2.0, quota=Quota(jobs=4, queued=0))
    lines = list_tokens(path, now=NOW)
    assert lines[1].split() == ["alice", "generate", "2026-12-01T10:00:00Z", "(expired)", "2", "jobs=4", "queued=0"]
    assert secret not in "".join(lines)
    assert hash_token(secret).hex()[:8] not in "".join(lines)


def test_plain_tokens_that_others_can_read_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("secret")
    path.chmod(0o644)
    assert "644" in (warn_of_readers(path) or "")
    path.chmod(0o600)
    assert warn_of_readers(path) is None
    path.unlink()
    add_token(path, "alice")
    path.chmod(0o644)
    assert warn_of_readers(path) is None
