"""Ctrl-C ends a command at once, whatever its threads do."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from edge_client.bundles.bundle import Bundle
from tests.support.fake_cloud import FakeCloud, Running
from tests.support.patience import HANG_S

_COMMAND = """
import signal, sys, threading
from edge_client.cli.main import main
from edge_client.inference.models import Models

def warm_up(models):
    print("loading", flush=True)
    threading.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored for what it starts
Models.warm_up = warm_up
main(sys.argv[1:])
"""


def test_a_model_that_is_loading_is_not_waited_for(
    bundle: Bundle, running: Running, fake: FakeCloud, tmp_path: Path
) -> None:
    """While the edge's model loads beside the cloud's steps, an interrupt stops both: the cloud is told."""
    fake.hang_after_call = 1
    options = ["--bundle", str(bundle.folder), "--server", running.target, "--mode", "hybrid", "-o", "fox.png"]
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "generate", "a fox", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        until = time.monotonic() + HANG_S
        while not [message for message in fake.sent if message.HasField("state")] and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=HANG_S / 10)
    finally:
        process.kill()

    assert (process.returncode, told.splitlines()[-1]) == (130, "Interrupted.")
    assert fake.cancel_seen.wait(HANG_S)


_TWICE = """
import atexit, os, signal, sys
from edge_client.cli.main import main

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(interrupt)
sys.modules["edge_client.cli.probe"] = type(sys)("probe")
import click
sys.modules["edge_client.cli.probe"].probe = click.Command("probe", callback=interrupt)
main(["probe"])
"""


def test_a_second_interrupt_changes_nothing() -> None:
    """Who presses Ctrl-C twice gets the exit code and the one line of an interrupt, and no traceback."""
    process = subprocess.run(
        [sys.executable, "-c", _TWICE], capture_output=True, text=True, timeout=HANG_S, check=False
    )

    assert (process.returncode, process.stderr) == (130, "Interrupted.\n")
