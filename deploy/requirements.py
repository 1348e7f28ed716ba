"""Prints what the package needs, with its extras: python requirements.py [EXTRA...], beside pyproject.toml.

A Dockerfile installs this before it copies the sources.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
sys.stdout.write("\n".join(sum(extras, project["dependencies"])) + "\n")
