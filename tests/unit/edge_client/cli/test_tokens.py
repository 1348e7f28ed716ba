"""Tokens of a gateway's clients on the command line."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_client.cli.main import main
from hybridsd.tokens import Quota, Tokens


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_tokens_are_added_listed_and_removed(tmp_path: Path) -> None:
    """The token is printed once, and its file has it hashed; the list says all but that."""
    file = tmp_path / "tokens.toml"
    added = run(
        "tokens", "add", "alice", "--client-tokens", file, "--scope", "generate", "--scope", "priority",
        "--expires", "90d", "--weight", "2", "--jobs", "3", "--queued", "0", "--steps-per-minute", "600",
        "--pixels", "262144", "--bytes", "1000",
    )  # fmt: skip
    secret = added.stdout.strip()
    token = Tokens(file).find(secret)
    listed = run("tokens", "list", "--client-tokens", file).stdout

    assert added.exit_code == 0
    assert token is not None
    assert (token.name, token.scopes, token.weight) == ("alice", {"generate", "priority"}, 2.0)
    assert token.quota == Quota(jobs=3, queued=0, steps_per_minute=600, pixels=262144, bytes=1000)
    assert token.expires is not None
    assert secret not in file.read_text() + listed
    assert "steps_per_minute=600" in listed

    again = run("tokens", "add", "alice", "--client-tokens", file)
    assert (again.exit_code, "already" in again.stderr) == (2, True)
    assert run("tokens", "remove", "alice", "--client-tokens", file).exit_code == 0
    assert Tokens(file).find(secret) is None
    gone = run("tokens", "remove", "alice", "--client-tokens", file)
    assert (gone.exit_code, "no token 'alice'" in gone.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("add", "a b"), "1 to 64 characters"),
        (("add", "a", "--expires", "soon"), "give a span such as 90d"),
        (("add", "a", "--scope", "all"), "generate"),
        (("add", "a", "--jobs", "0"), "range"),
    ],
)
def test_a_wrong_value_is_said(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = run("tokens", *words, "--client-tokens", tmp_path / "tokens")
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--trusted-proxy", "proxy.example"), "no address; give one such as"),
        (("--client-tokens", "broken"), "change --client-tokens"),
    ],
)
def test_serve_refuses_what_it_cannot_use(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken").write_text("[alice]\nsha256 = 'no hash'\n")
    result = run("serve", *words)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
