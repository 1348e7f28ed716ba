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
        (["vae", "--out", "{out}", "--set", "schedule.betas=(0.9,)"], "betas is '(0.9,)'; it must be a tuple of 2"),
        (["vae", "--out", "{out}", "--set", "kl_weight=-1"], "kl_weight is -1.0; it must be in [0, 1e+09]"),
        (["tiny-vae", "--out", "{out}", "--set", "adversarial_weight=-1"], "adversarial_weight is -1.0; it must be in"),
        (["sd-tiny-vae", "--out", "{out}", "--set", "terms.pixel_weight=-1"], "pixel_weight is -1.0; it must be in [0"),
        (
            ["sd-distill", "--out", "{out}"],
            "Error: student and data.spec are not set; give --set student=pruned_unet --set data.spec=imagefolder:",
        ),
        (["sd-lcm", "--out", "{out}", "--set", "data.spec=scenes"], "precision is fp16, which needs a GPU"),
        (["vae", "--out", "{out}", "--checkpoint-every", "2d"], "'2d' is not how often; give steps as 500, or a time"),
        (["score", "--out", "{out}", "--model", "x"], "--model needs --captions, a text file with a caption a line"),
        (["cost", "--splits", "a"], "'a' is not a list such as 25,10,0"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    """No traceback; the message names what is missing or wrong."""
    result = CliRunner().invoke(main, [part.format(out=tmp_path) for part in arguments])

    assert result.exit_code in (1, 2)
    assert message.format(out=tmp_path) in result.output
    assert "Traceback" not in result.output


HELP = """
import sys
from training.cli.main import main
for command in ([], *([name] for name in main.commands)):
    main([*command, "--help"], standalone_mode=False)
print("imported:", *sys.modules)
"""


def test_help_does_not_wait_for_torch() -> None:
    """Every command can be listed and described without importing a library that takes seconds to import."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    said, _, imported = done.stdout.rpartition("imported:")

    assert "small-unet" in said
    assert "--checkpoint-every" in said
    assert not {"torch", "diffusers", "transformers", "accelerate", "matplotlib", "numpy"} & set(imported.split())


def test_a_dry_run_prints_yaml_that_config_takes(tmp_path: Path) -> None:
    """What is printed gives the same recipe again; --set counts more than the file."""
    options = ("lcm-small", "--out", str(tmp_path), "--dry-run", "--yaml")
    printed = run(*options, "--set", "w_max=9", "--precision", "no").stdout
    path = tmp_path / "mine.yaml"
    path.write_text(printed)

    assert "recipe: lcm-small" in printed
    assert "w_max: 9.0" in printed
    assert run(*options, "--config", str(path)).stdout == printed
    assert "w_max: 8.0" in run(*options, "--config", str(path), "--set", "w_max=8").stdout


@pytest.mark.slow
def test_a_run_knows_what_it_is(tmp_path: Path) -> None:
    """Finished, it does nothing more, and refuses another recipe; what it recorded is taken again, and exported."""
    options = ("text", "--out", str(tmp_path), "--scale", "toy", "--track", "none")
    recorded = str(tmp_path / "text" / "recipe.yaml")
    how = ("--set", "schedule.validate_every=3", "--checkpoint-every", "2", "--keep", "9")
    first = run(*options, "--steps", "6", *how)
    again = run(*options, "--steps", "6")
    other = CliRunner().invoke(main, [*options, "--steps", "6", "--set", "hidden=64"])
    fewer = CliRunner().invoke(main, [*options, "--steps", "5"])
    wrong = CliRunner().invoke(main, ["lcm", "--out", str(tmp_path), "--config", recorded])
    exported = run("export-checkpoint", str(tmp_path / "text"), "--step", "4", "--to", str(tmp_path / "text-4"))
    kept = [path.name for path in sorted((tmp_path / "text").glob("checkpoint-*"))]
    longer = run("text", "--out", str(tmp_path), "--config", recorded, "--steps", "8", "--track", "none")

    assert "text step 3/6 held-out loss=" in first.stderr
    assert "grad_norm=" in first.stderr
    assert "samples/s" in first.stderr
    assert kept == ["checkpoint-00000002", "checkpoint-00000004", "checkpoint-00000006"]
    assert "was finished before, at step 6; there is nothing to do" in again.stderr
    assert "made with hidden 32 (now 64); give the same" in other.output
    assert "is finished at step 6, which is more than 5; choose another --out" in fewer.output
    assert "is of the recipe text, this is lcm" in wrong.output
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "text-4" / "tokenizer").is_dir()
    assert "schedule.steps 6 (now 8)" in longer.stderr
    assert (tmp_path / "text" / "checkpoint-00000008").is_dir()


@pytest.mark.slow
def test_a_run_of_an_older_version_gets_its_record(tmp_path: Path) -> None:
    """It goes on, says so, and is compared from then on; its checkpoint is exported if its recipe is named."""
    options = ["text", "--out", str(tmp_path), "--scale", "toy", "--steps", "3", "--track", "none"]
    run(*options)
    for name in ("run.json", "recipe.yaml"):
        (tmp_path / "text" / name).unlink()
    export = ["export-checkpoint", str(tmp_path / "text"), "--to", str(tmp_path / "out")]
    unknown = CliRunner().invoke(main, export)
    named = run(*export, "--recipe", "text", "--scale", "toy")
    again = run(*options)
    other = CliRunner().invoke(main, [*options, "--set", "layers=2"])

    assert "does not say of which recipe it is; give --recipe" in unknown.output
    assert named.exit_code == 0, named.output
    assert "an older version began it" in again.stderr
    assert "there is nothing to do" in again.stderr
    assert "made with layers 1 (now 2)" in other.output


LOGS = """
import logging
from training.cli.main import main
main(["cost", "--splits", "0"], standalone_mode=False)
for name in ("onnxscript.rewriter", "onnx_ir", "training.data"):
    logging.getLogger(name).info("info of %s", name)
    logging.getLogger(name).warning("warning of %s", name)
"""


@pytest.mark.slow
def test_libraries_say_little() -> None:
    """The terminal shows what this package tells, and of libraries warnings only."""
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, check=True)
    said = [line.partition(" ")[2] for line in done.stderr.splitlines() if " of " in line]

    assert said == [
        "warning of onnxscript.rewriter", "warning of onnx_ir", "info of training.data", "warning of training.data",
    ]  # fmt: skip


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
