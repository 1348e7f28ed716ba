"""The command line: what it shows, what it refuses, and how."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.patience import HANG_S
from tests.support.toy import run
from training.cli.main import main


def test_dry_run_shows_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    """--dry-run prints the resolved recipe, overrides included."""
    result = run("unet", "--out", str(tmp_path), "--steps", "7", "--set", "schedule.lr=0.5", "--seed", "3", "--dry-run")

    assert result.exit_code == 0
    for part in ("steps=7", "seed=3", "lr=0.5", "(64, 160, 320)"):
        assert part in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet", "--out", "{out}"], "run `python -m training latents --out"),
        (["prune", "--out", "{out}"], "{out}/unet"),
        (["unet", "--out", "{out}", "--set", "steps=3"], "there is no 'steps' to set; the names are schedule, widths"),
        (["sd-distill", "--out", "{out}", "--set", "teacher=/nowhere"], "give"),
        (["evaluate", "--out", "{out}"], "no unet and no small_unet in {out}"),
        (["evaluate", "--out", "{out}", "--splits", "26"], "26 is not within 0 to 25"),
        (["cost", "--large", "nothing"], "'nothing' is no folder, no hub id, and none of sd14"),
        (
            ["prune", "--out", "{out}", "--ratio", "0.5", "--parameters", "3"],
            "--parameters and --ratio do not go together",
        ),
        (["prune", "--out", "{out}", "--compat"], "--compat is the published rule, which has thresholds"),
        (["vae", "--out", "{out}", "--set", "schedule.decay=foo"], "decay is 'foo'; choose one of constant"),
        (["cost", "--splits", "a"], "'a' is not a list such as 25,10,0"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    """No traceback; the message names what is missing or wrong."""
    result = CliRunner().invoke(main, [part.format(out=tmp_path) for part in arguments])

    assert result.exit_code in (1, 2)
    assert message.format(out=tmp_path) in result.output
    assert "Traceback" not in result.output


def test_help_does_not_wait_for_torch() -> None:
    """Every command can be listed and described without importing a library that takes seconds to import."""
    code = (
        "import sys; from training.cli.main import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "small-unet" in done.stdout
    assert not [name for name in ("torch", "diffusers", "transformers", "matplotlib") if f"'{name}'" in done.stdout]


@pytest.mark.slow
def test_costs_are_the_published_ones() -> None:
    """In the reference's convention, also as JSON."""
    rows = json.loads(run("cost", "--as", "json", "--splits", "25,10").output)
    models = {row["model"]: row for row in rows if row.get("model") and row["convention"] == "reference"}
    splits = {row["cloud_steps"]: row for row in rows if "cloud_steps" in row and row["convention"] == "real"}

    assert models["sd14"]["parameters"] == 859_520_964
    assert models["hybrid-224m"]["parameters"] == 224_490_116
    assert models["hybrid-224m"]["macs"] == pytest.approx(302.572e9, rel=1e-5)
    assert splits[10]["cloud_share"] + splits[10]["edge_share"] == pytest.approx(1)
    assert splits[10]["cloud_macs"] < splits[25]["cloud_macs"]


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM lets the step in hand finish; the exit code says so, and the same command goes on."""
    command = [sys.executable, "-m", "training", "vae", "--out", str(tmp_path), "--scale", "toy", "--steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while "process(es)" not in said:
            said += process.stderr.readline()
        time.sleep(3)  # into the steps, if the machine is quick; before the first, if not
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=HANG_S)
    (checkpoint,) = (tmp_path / "vae").glob("checkpoint-*")

    assert process.returncode == 130, said + rest
    assert "the same command continues from there" in rest
    assert not (tmp_path / "vae" / "finished.json").exists()
    assert (checkpoint / "learnt.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    """--processes starts them; they leave one checkpoint of the whole and say things once."""
    command = [
        sys.executable,
        "-m",
        "training",
        "--processes",
        "2",
        "vae",
        "--out",
        str(tmp_path),
        "--scale",
        "toy",
        "--steps",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    state = json.loads((tmp_path / "vae" / "checkpoint-00000004" / "state.json").read_text())

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 process(es)") == 1
    assert state["step"] == 4
    assert (tmp_path / "vae" / "config.json").is_file()
