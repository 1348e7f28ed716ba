"""Makes what the profiles `tls` and `observability` of docker-compose.yml mount: tokens, certificates, a password.

    python deploy/make_secrets.py [--name HOST]... [--folder deploy/secrets]

What is there already stays: delete a file to have another. Prints the token that web clients send, once. Knows only
the commands that an operator types.
"""

import argparse
import secrets
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def cloud(*words: str | Path) -> str:
    """Runs `hybridsd-cloud`; returns what it printed."""
    command = [str(BIN / "hybridsd-cloud"), *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def hand_out(file: Path, name: str, scope: str, into: Path) -> None:
    """Adds a token to a token file and writes it where who uses it looks, unless both have it."""
    known = file.exists() and f"[{name}]" in file.read_text(encoding="utf-8")
    if known and into.exists():
        return
    if known:
        cloud("tokens", "remove", name, "--file", file)
    write(into, cloud("tokens", "add", name, "--file", file, "--scope", scope))


def copy_table(source: Path, name: str, target: Path) -> None:
    """Lets a token of one token file into another one, as the last of both."""
    _, _, table = source.read_text(encoding="utf-8").partition(f"[{name}]\n")
    if table in target.read_text(encoding="utf-8"):
        return
    if f"[{name}]" in target.read_text(encoding="utf-8"):
        cloud("tokens", "remove", name, "--file", target)
    with target.open("a", encoding="utf-8") as stream:
        stream.write(f"\n[{name}]\n{table}")


def write(file: Path, content: str) -> None:
    """Writes a file that users of containers can read; the folder above it is this user's alone."""
    file.write_text(content, encoding="utf-8")
    file.chmod(0o644)


def make_certificate(file: Path, names: list[str]) -> str:
    """Makes a certificate with its key, unless it is there; returns the certificate alone."""
    words = ["fingerprint", "--tls-dir", file.parent, *(word for name in names for word in ("--tls-name", name))]
    certificate = cloud(*words, "--pem")
    (made,) = (path for path in file.parent.glob("*.pem") if "PRIVATE KEY" in path.read_text(encoding="utf-8"))
    made.rename(file)
    file.chmod(0o644)
    return certificate


def main(arguments: list[str] | None = None) -> int:
    """Makes what is missing. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes the secrets of docker-compose.yml; keeps those that are there.")
    parser.add_argument("--name", action="append", default=[], help="by which other machines call this one; repeatable")
    parser.add_argument("--folder", type=Path, default=ROOT / "deploy/secrets", help="default: deploy/secrets")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # what is inside can be read by users of containers, whose names are not known here
    parts = {name: folder / name for name in ("cloud", "gateway", "prometheus", "grafana")}
    for part in parts.values():
        part.mkdir(exist_ok=True)
        part.chmod(0o755)

    for name, readers in (("cloud", ("gateway", "prometheus")), ("gateway", ("prometheus",))):
        if not (parts[name] / "tls.pem").exists():
            certificate = make_certificate(parts[name] / "tls.pem", [f"{name}-tls", *options.name])
            for reader in readers:
                write(parts[reader] / f"{name}.pem", certificate)
    tokens, clients = parts["cloud"] / "tokens.toml", parts["gateway"] / "client-tokens.toml"
    hand_out(tokens, "gateway", "generate", parts["gateway"] / "token")
    hand_out(tokens, "prometheus", "metrics", parts["prometheus"] / "token")
    if not clients.exists():
        token = cloud("tokens", "add", "first", "--file", clients, "--scope", "generate").strip()
        sys.stdout.write(f"the token of web clients, shown only now: {token}\n")
    copy_table(tokens, "prometheus", clients)  # one token opens the metrics of both
    if not (parts["grafana"] / "password").exists():
        write(parts["grafana"] / "password", secrets.token_urlsafe(24) + "\n")
    tokens.chmod(0o644)
    clients.chmod(0o644)
    sys.stdout.write(f"secrets are in {folder}; Grafana's user is admin, its password in grafana/password\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
