"""The secrets of docs/kubernetes.md, made by its own commands without a cluster."""

import base64
import re
import shlex
import subprocess
from pathlib import Path

import yaml

from deploy.run_demo import BIN, ROOT
from tests.support.patience import HANG_S


def commands() -> list[list[str]]:
    """Returns the lines of the document that make secrets."""
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:python deploy/make_secrets\.py|kubectl -n hybridsd create secret) .*", text, re.MULTILINE)
    return [shlex.split(line) for line in lines if "|" not in line]


def made_secrets(folder: Path) -> tuple[dict[str, dict[str, bytes]], str]:
    """Runs them; what they write is in a folder of its own.

    Returns:
        Names of secrets with their files, and the token of web clients.
    """
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    (service,) = re.findall(r"^```ini\n# pg_service.conf\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pg_service.conf").write_text(service, encoding="utf-8")
    found: dict[str, dict[str, bytes]] = {}
    token = ""
    for program, *words in commands():
        here = [word.replace("deploy/secrets", str(folder)) for word in words]
        if program == "kubectl":
            here += ["--dry-run=client", "--output=yaml"]
        else:
            here += ["--folder", str(folder)]
        done = subprocess.run(
            [BIN / program, *here], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False
        )
        assert done.returncode == 0, done.stderr
        if program == "kubectl":
            secret = yaml.safe_load(done.stdout)
            data = {key: base64.b64decode(value) for key, value in secret["data"].items()}
            found[secret["metadata"]["name"]] = data
        else:
            (token,) = re.findall(r"shown only now: (\S+)", done.stdout)
    return found, token
