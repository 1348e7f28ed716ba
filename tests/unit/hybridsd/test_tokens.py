"""The token file of cloud and gateway."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hybridsd import tokens
from hybridsd.tokens import Quota, Tokens, add_token, hash_token, parse_tokens, remove_token

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
