"""What `hybridsd generate` writes where, and what it refuses to read over."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edge_client.cli.main import main
from tests.support.fake_cloud import Running
from tests.support.patience import HANG_S

AT_THE_EDGE = ("a fox", "--mode", "edge", "--seed", "1")


@pytest.fixture
def generate(tmp_path: Path, bundle_folder: Path, running: Running, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    environment = {"HYBRIDSD_EDGE_BUNDLE": str(bundle_folder), "HYBRIDSD_EDGE_SERVER": running.target}

    def run(*arguments: str, code: int = 0, **more: str) -> Result:
        result = CliRunner().invoke(main, ["generate", *arguments], env={**environment, **more})
        assert result.exit_code == code, result.output
        return result

    return run


def test_paths_go_down_the_pipe(generate) -> None:
    """Standard output has a path a line, for whatever comes next; --quiet has none."""
    result = generate(*AT_THE_EDGE, "--num-images", "2")

    assert [Path(line).is_file() for line in result.stdout.splitlines()] == [True, True]
    assert generate(*AT_THE_EDGE, "--quiet").output == ""


def test_an_image_goes_down_the_pipe(generate) -> None:
    """`-o -` writes the image itself to standard output, and no file of that name."""
    result = generate(*AT_THE_EDGE, "-o", "-")

    assert Image.open(io.BytesIO(result.stdout_bytes)).size == (32, 32)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--json"], "leave out --json"),
        (["--jsonl"], "leave out --jsonl"),
        (["--preview-every", "1"], "leave out --preview-every"),
        (["--save-steps", "x"], "leave out --save-steps"),
        (["--num-images", "2"], "takes one image"),
    ],
)
def test_nothing_else_goes_down_the_pipe(generate, more: list[str], says: str) -> None:
    """What would mix with the image, or need a name, is refused."""
    assert says in generate(*AT_THE_EDGE, "-o", "-", *more, code=2).stderr
    assert list(Path().iterdir()) == []


def test_two_kinds_of_json_exclude_each_other(generate) -> None:
    """--json and --jsonl are not one of them silently."""
    assert "exclude each other" in generate(*AT_THE_EDGE, "--json", "--jsonl", code=2).stderr


def test_webp(generate) -> None:
    """A name that ends in .webp is a WebP file."""
    generate(*AT_THE_EDGE, "-o", "fox.webp")

    with Image.open("fox.webp") as image:
        assert image.format == "WEBP"


def test_image_index_draws_one_of_many_again(generate) -> None:
    """--image-index 2 is what --num-images drew third."""
    generate(*AT_THE_EDGE, "--num-images", "3", "-o", "many.png")
    generate(*AT_THE_EDGE, "--image-index", "2", "-o", "one.png")

    assert Path("many-2.png").read_bytes() == Path("one.png").read_bytes()


@pytest.mark.parametrize("every", ["0", "1", "2"])
def test_steps_are_all_steps(generate, every: str) -> None:
    """However rarely the cloud sends a state, each of its steps is in the record, in order."""
    out = generate("a fox", "--split", "3,3", "--state-every", every, "--json").stdout
    steps = json.loads(out)["images"][0]["steps"]

    assert [(step["step"], step["place"]) for step in steps] == [
        *((step, "cloud") for step in range(3)), *((step, "edge") for step in range(3, 6)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "large"), ("--cloud-skip", "2,1"), ("--state-every", "0"), ("--codec", "int8"),
        ("--lora", "style:0.5"), ("--deadline", "3"),
    ],
)  # fmt: skip
def test_mode_edge_swallows_no_option(generate, option: str, value: str) -> None:
    """What only the cloud could do is refused where no step is the cloud's, with the mode's name."""
    said = generate(*AT_THE_EDGE, option, value, code=2).stderr

    assert f"{option} is for the cloud, and mode edge runs no step there" in said
    assert option in generate("a fox", "--split", "0,6", option, value, code=2).stderr
    assert option in generate("a fox", "--segments", "small:6@edge", option, value, code=2).stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fit", "pad"], "--fit goes with --image"),
        (["--mask-blur", "3"], "--mask-blur goes with --mask"),
        (["--segments", "small:3@cloud,small:3@edge", "--model", "large"], "leave out --model"),
    ],
)
def test_no_option_is_swallowed(generate, options: list[str], says: str) -> None:
    """An option without an effect is refused, whatever it is about."""
    assert says in generate("a fox", *options, code=2).stderr


def test_a_file_has_the_negative_prompts(generate) -> None:
    """A list of prompts and --negative-prompt exclude each other."""
    Path("prompts.txt").write_text("a fox\nblurry\n")
    Path("list.csv").write_text("name,caption\na.png,a fox\n")

    for words in (["--prompts-file", "prompts.txt"], ["--csv", "list.csv", "-o", "out/"]):
        assert "leave out --negative-prompt" in generate(*words, "-n", "ugly", code=2).stderr


def test_what_happens_anyway_may_be_asked_for(generate) -> None:
    """Exact numbers and every state are what this device has without a cloud."""
    generate(*AT_THE_EDGE, "--codec", "fp32", "--state-every", "1")


def test_the_environment_is_for_every_command(generate) -> None:
    """A variable that sets how tensors travel does not forbid mode edge; an adapter, which would be missed, does."""
    generate(*AT_THE_EDGE, HYBRIDSD_EDGE_CODEC="int8")

    assert "--lora is for the cloud" in generate(*AT_THE_EDGE, code=2, HYBRIDSD_EDGE_LORA="style").stderr


@pytest.mark.parametrize(
    ("options", "planned", "of"),
    [
        (["--split", "4,4", "--strength", "0.5"], 2, 4),
        (["--split", "2,6", "--steps", "8", "--strength", "0.75"], 2, 6),
        (["--cloud-steps", "6", "--strength", "0.5"], 3, 3),
        (["--strength", "0.5"], 2, 3),
        (["--split", "4,4", "--strength", "1"], 4, 8),
        (["--split", "8,0", "--strength", "0.5", "--mode", "cloud"], 4, 4),
    ],
)
def test_a_split_shrinks_with_strength(generate, options: list[str], planned: int, of: int) -> None:
    """Cloud and edge steps are parts of --steps; with an image both shrink alike, given or by default."""
    Image.new("RGB", (32, 32), "red").save("in.png")
    (image,) = json.loads(generate("a fox", "--image", "in.png", *options, "--dry-run").stdout)["images"]

    assert (image["cloud_steps"], image["num_inference_steps"]) == (planned, of)


def test_more_cloud_steps_than_steps(generate) -> None:
    """Where an image takes steps away, a split is still compared with --steps."""
    Image.new("RGB", (32, 32), "red").save("in.png")
    said = generate("a fox", "--image", "in.png", "--cloud-steps", "7", "--strength", "0.5", code=2).stderr

    assert "--cloud-steps is 7, but there are 6 steps; choose 0 to 6" in said


def test_a_cut_prompt_is_said(generate) -> None:
    """Tokens that did not fit are said whoever encodes the text."""
    for more in (["--mode", "edge"], ["--private"]):
        said = generate("fox " * 60, *more).stderr
        assert "tokens of the text did not fit" in said
    assert "did not fit" not in generate("fox " * 20, "--mode", "edge", "--long-prompt", "chunk", "-o", "x.png").stderr


def test_messages_name_options(generate) -> None:
    """A message of the shared rooms speaks of options here, in JSON as well."""
    result = generate("a fox", "--steps", "0", "--json", code=2)

    assert "Error: --steps is 0; choose 1 to 1000" in result.stderr
    assert json.loads(result.stdout)["error"]["message"].startswith("--steps is 0")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--quality", "nan"], "'--quality': nan is not in the range 0<=x<=1"),
        (["--wait-for-server", "nan"], "'--wait-for-server': nan is not in the range"),
        (["--idle-timeout", "nan"], "'--idle-timeout': nan is not in the range"),
        (["--cloud-steps", "\u00b2"], "is no number from 0 on, nor auto"),
        (["--cloud-steps", "9" * 5000], "is no number from 0 on, nor auto"),
        (["--segments", f"large:{'9' * 5000}@cloud"], "is not MODEL:STEPS@PLACE"),
        (["--segments", "small:*@edge(steps=\u00b2)"], "steps is '\u00b2'; choose 1 to"),
        (["--aspect", f"{'9' * 5000}:1"], "--aspect is '9999"),
        (["--fit-size", "--width", "0"], "--width is 0; choose at least 1"),
        (["--fit-size", "--height", "-8"], "--height is -8; choose at least 1"),
        (["--split", "5"], "--split is '5'; give"),
        (["--max-latency", "0"], "--max-latency is '0'; give"),
        (["--lora", "a:b"], "--lora is 'a:b'; give"),
        (["--edge-model", "x"], "--edge-model is 'x'; give"),
    ],
)
def test_numbers_that_are_none(generate, options: list[str], says: str) -> None:
    """NaN, digits of other scripts, numbers of thousands of digits: wrong usage, named as the option."""
    assert says in generate("a fox", *options, code=2).stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("option", ["--prompts-file", "--csv"])
def test_files_in_another_encoding(generate, option: str) -> None:
    """A file that Windows saved as UTF-16 is refused by the option's name, with what to do."""
    Path("prompts").write_text("a fox\n\n", encoding="utf-16")

    assert f"{option} is not UTF-8 text (byte 1); save it as UTF-8" in generate(option, "prompts", code=2).stderr


def test_a_port_that_is_no_number(generate) -> None:
    """A server that cannot be is refused, however long one waits for it."""
    for port in ("\u00b2", "9" * 5000):
        said = generate("a fox", "--server", f"127.0.0.1:{port}", "--wait-for-server", "9", code=2)
        assert "give host:port" in said.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [["-o", "-"], []])
def test_a_full_disk_is_no_bug(tmp_path: Path, bundle_folder: Path, words: list[str]) -> None:
    """Where standard output takes nothing more, the exit code and the message say so."""
    command = [sys.executable, "-c", "from edge_client.cli.main import main; main()"]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [*command, "generate", *AT_THE_EDGE, *words, "--bundle", str(bundle_folder)],
            cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG_S, check=False,
        )  # fmt: skip

    assert (run.returncode, "cannot write" in run.stderr, "bug" in run.stderr) == (2, True, False), run.stderr
