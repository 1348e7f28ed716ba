"""The command line, through click's own runner, against the toy bundle and the fake cloud."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edge_client.cli import main, side_outputs
from edge_client.cli.shared_options import CONTEXT
from edge_client.cloud.client import Cloud
from edge_client.generation import saved_state
from edge_client.images import files
from hybridsd.errors import Reason
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Running
from tests.support.patience import HANG_S


class Shell:
    """Runs `hybridsd` in a folder of its own."""

    def __init__(self, folder: Path, bundle: Path, target: str) -> None:
        self.folder = folder
        self._environment = {"HYBRIDSD_EDGE_BUNDLE": str(bundle), "HYBRIDSD_EDGE_SERVER": target}

    def __call__(self, *arguments: str, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(main.main, list(arguments), env=self._environment, input=stdin)
        assert result.exit_code == code, result.output
        return result

    def json(self, *arguments: str, code: int = 0) -> dict:
        result = self("generate", *arguments, "--json", code=code)
        assert result.stderr == "" or code
        return json.loads(result.stdout)


@pytest.fixture
def shell(tmp_path: Path, bundle_folder: Path, running: Running, monkeypatch: pytest.MonkeyPatch) -> Shell:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Shell(folder, bundle_folder, running.target)


def pixels(path: str | Path) -> np.ndarray:
    """Returns the pixels of an image."""
    return files.read_png(Path(path))[0]


def test_generate_writes_a_picture(shell: Shell) -> None:
    """The plainest call draws an image with the cloud's help and prints where it is, and nothing else."""
    result = shell("generate", "a red fox", "--seed", "5")
    picture, provenance, parameters = files.read_png(shell.folder / "a-red-fox-5.png")

    assert result.stdout == "a-red-fox-5.png\n"
    assert "wrote a-red-fox-5.png" in result.stderr
    assert picture.shape == (32, 32, 3)
    assert provenance is not None
    assert (provenance["mode"], provenance["handoff"]["actual"], provenance["seed"]) == ("hybrid", 3, 5)
    assert parameters is not None
    assert "Steps: 6, Sampler: DDIM, CFG scale: 3, Seed: 5, Size: 32x32, Model: fake-large" in parameters


def test_json_is_one_object(shell: Shell) -> None:
    """With --json standard output is one object and nothing else, with places, bytes and usage."""
    (image,) = shell.json("a red fox", "--seed", "5", "--split", "2,4")["images"]

    assert (image["handoff"], image["mode"]) == ({"planned": 2, "actual": 2, "reason": None}, "hybrid")
    assert [step["place"] for step in image["steps"]] == ["cloud"] * 2 + ["edge"] * 4
    assert image["usage"]["num_calls"] == 2
    assert image["received_bytes"] > 0
    assert Path(image["path"]).is_file()


def test_jsonl_is_an_event_a_line(shell: Shell, fake: FakeCloud) -> None:
    """With --jsonl each event is a line, the last one the finished image with its path."""
    fake.die_after_call = 2
    result = shell("generate", "a red fox", "--jsonl")
    events = [json.loads(line) for line in result.stdout.splitlines()]

    names = ["planned", "queued", "cloud_started", "step_done", "step_done", "retrying", "queued", "cloud_started"]
    assert [event["event"] for event in events] == [*names, "fallback", *["step_done"] * 4, "finished"]
    fallback = events[8]
    assert (fallback["planned"], fallback["actual"], fallback["reason"]) == (3, 2, "UNAVAILABLE")
    assert Path(events[-1]["path"]).is_file()


def test_quiet_says_nothing(shell: Shell) -> None:
    """With --quiet nothing is printed."""
    assert shell("generate", "a red fox", "--quiet").output == ""


def test_same_seed_same_file(shell: Shell) -> None:
    """The same request writes the same bytes, another seed does not."""
    for name, seed in (("a.png", "9"), ("b.png", "9"), ("c.png", "10")):
        shell("generate", "a red fox", "--seed", seed, "-o", name)
    a, b, c = ((shell.folder / name).read_bytes() for name in ("a.png", "b.png", "c.png"))

    assert a == b
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))
    assert a != c


def test_random_seed_is_told(shell: Shell) -> None:
    """Without a seed two calls differ, and the seed that is told makes the image again."""
    first, second = (shell.json("a red fox")["images"][0] for _ in range(2))
    again = shell.json("a red fox", "--seed", str(first["seed"]))["images"][0]

    assert first["seed"] != second["seed"]
    assert np.array_equal(pixels(first["path"]), pixels(again["path"]))


def test_environment_gives_every_option(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable HYBRIDSD_EDGE_... stands for the option, and a flag wins over it."""
    monkeypatch.setenv("HYBRIDSD_EDGE_CLOUD_STEPS", "1")
    monkeypatch.setenv("HYBRIDSD_EDGE_SEED", "77")
    (image,) = shell.json("a red fox")["images"]
    (other,) = shell.json("a red fox", "--cloud-steps", "2")["images"]

    assert (image["handoff"]["actual"], image["seed"]) == (1, 77)
    assert (other["handoff"]["actual"], other["seed"]) == (2, 77)


def _options(command: click.Command, path: str = "hybridsd") -> Iterator[tuple[str, click.Command, click.Option]]:
    for option in command.params:
        if isinstance(option, click.Option) and not {"--help", "--version"} & {*option.opts}:
            yield path, command, option
    for name, below in getattr(command, "commands", {}).items():
        yield from _options(below, f"{path} {name}")


@pytest.mark.parametrize(
    ("command", "option"),
    [pytest.param(c, o, id=f"{path} {o.opts[0]}") for path, c, o in _options(main.main)],
)
def test_each_option_has_its_variable(
    command: click.Command, option: click.Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable of an option is HYBRIDSD_EDGE_ and its first long name."""
    name = next(name for name in option.opts if name.startswith("--"))
    monkeypatch.setenv(f"HYBRIDSD_EDGE_{name.removeprefix('--').replace('-', '_').upper()}", "given")
    context = click.Context(command, **CONTEXT)

    assert command.context_settings == CONTEXT
    assert option.resolve_envvar_value(context) == "given"


def test_a_prompt_of_the_line_wins(shell: Shell, fake: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt can come from the environment, and one on the command line wins over it."""
    monkeypatch.setenv("HYBRIDSD_EDGE_PROMPT", "a dog")
    shell("generate")
    shell("generate", "a red fox")

    assert [request.text.prompt for request in fake.requests] == ["a dog", "a red fox"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a fox", "--split", "2,3,4"], "give cloud and edge steps"),
        (["a fox", "--split", "2"], "give cloud and edge steps"),
        (["a fox", "--split", "x,3"], "give cloud and edge steps"),
        (["a fox", "--split", "-1,3"], "give cloud and edge steps"),
        (["a fox", "--split", "0,0"], "give cloud and edge steps"),
        (["a fox", "--split", "2,4", "--steps", "7"], "2 cloud steps of 6"),
        (["a fox", "--cloud-steps", "9"], "choose 0 to 6"),
        (["a fox", "--mode", "edge", "--cloud-steps", "2"], "--mode edge runs 0 of 6 steps in the cloud, not 2"),
        (["a fox", "--mode", "cloud", "--split", "2,4"], "--mode cloud runs 6 of 6 steps"),
        (["a fox", "--steps", "0"], "--steps is 0; choose 1 to 1000"),
        (["a fox", "--steps", "1001"], "choose 1 to 1000"),
        (["a fox", "--guidance-scale", "0.5"], "choose 1 to 30"),
        (["a fox", "--cfg-scale", "1", "-n", "blurry"], "leave it out or raise --guidance-scale"),
        (["a fox", "--width", "33"], "choose a multiple of 16"),
        (["a fox", "--height", "8192"], "choose a multiple of 16 from 16 to 4096"),
        (["a fox", "--seed", "-2"], "--seed is -2; choose 0 to"),
        (["a fox", "--scheduler", "magic"], "'magic' is unknown; choose one of ddim"),
        (["a fox", "--deadline", "-1"], "choose more than 0"),
        (["a fox", "--deadline", "nan"], "choose more than 0"),
        (["a fox", "--deadline", "inf"], "at most 86400"),
        (["a fox \udcff"], "--prompt is not UTF-8"),
        (["a fox", "--model", "\udcff"], "--model is not UTF-8"),
        (["a fox", "--save-latents", "x.npz", "--save-latents-at", "6"], "choose 1 to 5, or leave it out"),
        (["a fox", "--save-latents", "x.png", "-o", "x.png"], "are both x.png"),
        (["a fox", "-o", "\udcff.png"], "is not UTF-8"),
        (["a fox", "-o", "/proc/fox.png"], "cannot write /proc/fox.png"),
        (["a fox", "--save-latents", "/proc/x/fox.npz"], "cannot write /proc/x/fox.npz"),
        (["a fox", "--save-steps", "/proc/x"], "cannot write /proc/x/step.png"),
        (["a fox", "-o", "x" * 300 + ".png"], "File name too long"),
        (["a fox", "--provider", "quantum"], "'quantum': this build of ONNX Runtime does not have it"),
        (["a fox", "--server", "nowhere"], "give host:port"),
        (["a fox", "-o", "fox.bmp"], "does not end in .png"),
        (["a fox", "--save-latents-at", "2"], "needs --save-latents"),
        (["  "], "the prompt is empty"),
        (["x" * 4001], "has 4001 characters; at most 4000"),
        ([], "say what to draw"),
        (["a fox", "-p", "a dog"], "in one way"),
    ],
)
def test_wrong_usage_exits_with_2(shell: Shell, fake: FakeCloud, arguments: list[str], says: str) -> None:
    """What is wrong is named with what is allowed; nothing is sent and nothing is written."""
    result = shell("generate", *arguments, code=2)

    assert says in result.stderr
    assert fake.requests == []
    assert list(shell.folder.iterdir()) == []


def test_zero_is_a_seed(shell: Shell) -> None:
    """Seed 0 is the seed 0, not an absent one."""
    assert shell.json("a red fox", "--seed", "0")["images"][0]["seed"] == 0


@pytest.mark.parametrize(
    ("setting", "reason", "code"),
    [
        ({"die_after_call": 1}, "UNAVAILABLE", 4),
        ({"refuse_with": Reason.DEADLINE_EXCEEDED}, "DEADLINE_EXCEEDED", 4),
        ({"busy_times": 99, "busy_delay_s": 60.0}, "QUEUE_FULL", 4),
        ({"busy_times": 99, "busy_delay_s": 60.0, "busy_with": Reason.QUOTA_EXCEEDED}, "QUOTA_EXCEEDED", 4),
        ({"die_after_call": 1, "die_with": Reason.INTERNAL}, "INTERNAL", 70),
    ],
)
def test_no_fallback_exit_codes(
    shell: Shell, fake: FakeCloud, setting: dict[str, object], reason: str, code: int
) -> None:
    """A lost cloud is an image with a reason, or with --no-fallback the exit code of the table and no image."""
    for name, value in setting.items():
        setattr(fake, name, value)
    (image,) = shell.json("a red fox", "-o", "with.png")["images"]
    error = shell.json("a red fox", "-o", "without.png", "--no-fallback", code=code)["error"]

    assert image["handoff"]["reason"] == reason
    assert (error["reason"], error["exit_code"]) == (reason, code)
    assert sorted(path.name for path in shell.folder.iterdir()) == ["with.png"]


@pytest.mark.parametrize("reason", [Reason.MODEL_UNKNOWN, Reason.UNAUTHENTICATED])
def test_a_refusal_exits_with_3(shell: Shell, fake: FakeCloud, reason: Reason) -> None:
    """What the cloud refuses is not drawn in another way."""
    fake.refuse_with = reason

    assert "refused" in shell("generate", "a red fox", code=3).stderr
    assert list(shell.folder.iterdir()) == []


def test_edge_mode_speaks_to_nobody(shell: Shell, fake: FakeCloud) -> None:
    """Mode edge asks no cloud."""
    (image,) = shell.json("a red fox", "--mode", "edge")["images"]

    assert (image["mode"], image["received_bytes"], fake.requests) == ("edge", 0, [])


def test_private_prompt_stays_here(shell: Shell, fake: FakeCloud) -> None:
    """With --private no message holds the prompt."""
    shell("generate", "a red fox", "--private")

    assert fake.requests
    assert all(b"fox" not in request.SerializeToString() for request in fake.requests)


def test_existing_files_are_safe(shell: Shell) -> None:
    """A named file is never written over unless told so; chosen names step aside."""
    shell("generate", "a red fox", "--seed", "1", "-o", "fox.png")
    before = (shell.folder / "fox.png").read_bytes()
    refused = shell("generate", "a red fox", "--seed", "2", "-o", "fox.png", code=2)
    for _ in range(2):
        shell("generate", "a red fox", "--seed", "1", "-o", "out/")

    assert "is there already" in refused.stderr
    assert (shell.folder / "fox.png").read_bytes() == before
    assert sorted(path.name for path in (shell.folder / "out").iterdir()) == ["a-red-fox-1-2.png", "a-red-fox-1.png"]
    shell("generate", "a red fox", "--seed", "2", "-o", "fox.png", "--overwrite")
    assert (shell.folder / "fox.png").read_bytes() != before


def test_several_images(shell: Shell) -> None:
    """--num-images numbers images of one seed; each can be told from the others."""
    shell("generate", "a red fox", "--seed", "1", "--num-images", "3", "-o", "fox.png")
    names = ["fox-0.png", "fox-1.png", "fox-2.png"]

    assert sorted(path.name for path in shell.folder.iterdir()) == names
    assert len({pixels(name).tobytes() for name in names}) == 3
    assert [files.read_png(Path(name))[1]["image_index"] for name in names] == [0, 1, 2]


def test_prompts_file(shell: Shell, fake: FakeCloud) -> None:
    """Alternating lines become images; three quotes and blank lines are empty negative prompts."""
    (shell.folder / "prompts.txt").write_text('a red fox\nblurry text\n\na dog\n"""\na cat')
    shell("generate", "--prompts-file", "prompts.txt", "--seed", "4", "-o", "out/")

    sent = [(request.text.prompt, request.text.negative_prompt, request.seed) for request in fake.requests]
    assert sent == [("a red fox", "blurry text", 4), ("a dog", "", 5), ("a cat", "", 6)]
    assert len(list((shell.folder / "out").iterdir())) == 3


def test_prompts_from_standard_input(shell: Shell, fake: FakeCloud) -> None:
    """A dash reads the pairs from standard input."""
    shell("generate", "--prompts-file", "-", stdin="a red fox\n\n")

    assert [request.text.prompt for request in fake.requests] == ["a red fox"]


def test_csv(shell: Shell, fake: FakeCloud) -> None:
    """Rows name the files to write, as the reference's metadata.csv does."""
    text = 'name,caption,negative\nanimals/fox.png,"a fox, red",blurry\ndog.jpg,a dog,\n'
    (shell.folder / "metadata.csv").write_text(text)
    shell("generate", "--csv", "metadata.csv", "-o", "out/")

    assert [request.text.prompt for request in fake.requests] == ["a fox, red", "a dog"]
    assert files.read_png(shell.folder / "out" / "animals" / "fox.png")[1]["negative_prompt"] == "blurry"
    assert (shell.folder / "out" / "dog.jpg").read_bytes()[:2] == b"\xff\xd8"
    shell("generate", "--csv", "metadata.csv", "-o", "out/", code=2)


@pytest.mark.parametrize(
    "row",
    ["../fox.png,a fox", "/tmp/fox.png,a fox", "fox.png", ",a fox", "a.png,x\na.png,y",
     "a.png,x\n./a.png,y", ".,x", "a/..,x", "a\\b.png,x", f'a.png,"{"x" * 140000}"'],
)  # fmt: skip
def test_bad_csv(shell: Shell, row: str) -> None:
    """Rows that leave the folder, name a file twice or lack something are refused before anything is drawn."""
    (shell.folder / "metadata.csv").write_text(f"name,caption\n{row}\n")
    result = shell("generate", "--csv", "metadata.csv", code=2)

    assert "CSV line" in result.stderr
    assert [path.name for path in shell.folder.iterdir()] == ["metadata.csv"]


@pytest.mark.parametrize(
    ("extra", "second"),
    [("--save-steps", "b/fox.png"), ("--preview-every", "a/fox.jpg"), ("--preview-every", "a/fox-preview-002.png")],
)
def test_extras_of_a_batch_do_not_collide(shell: Shell, fake: FakeCloud, extra: str, second: str) -> None:
    """Rows whose previews or images of steps would have the same names are refused before anything is drawn."""
    (shell.folder / "metadata.csv").write_text(f"name,caption\na/fox.png,a fox\n{second},a dog\n")

    assert "two are called" in shell("generate", "--csv", "metadata.csv", extra, "2", code=2).stderr
    assert fake.requests == []


def test_a_batch_that_fails_says_what_is_done(shell: Shell, fake: FakeCloud) -> None:
    """With --json a batch that ends in the middle lists the images that are written, beside the error."""
    (shell.folder / "metadata.csv").write_text("name,caption\na.png,a fox\nb.png,a dog\nc.png,a cat\n")
    fake.refuse_from_request = 1
    told = shell.json("--csv", "metadata.csv", code=3)

    assert [image["path"] for image in told["images"]] == ["a.png"]
    assert (told["error"]["reason"], told["error"]["exit_code"]) == ("MODEL_UNKNOWN", 3)
    assert pixels("a.png").shape == (32, 32, 3)


def test_an_absent_cloud_is_waited_for_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch asks a host that never answers for its first image only, says so once, and draws the rest alone."""
    opened = []
    open_job = Cloud.open
    monkeypatch.setattr(Cloud, "open", lambda cloud, job: opened.append(cloud.away) or open_job(cloud, job))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        defaults = {**(Cloud.__init__.__kwdefaults__ or {}), "connect_timeout_s": 0.3}
        monkeypatch.setattr(Cloud.__init__, "__kwdefaults__", defaults)
        result = shell("generate", "a red fox", "--num-images", "3", "--server", target, "-o", "fox.png")

    assert opened[0] is None
    assert opened[1] is not None
    assert opened[1] == opened[2]
    assert result.stderr.count("drawn here without asking again") == 1
    assert result.stderr.count("edge takes over") == 3
    assert len(list(shell.folder.glob("fox-*.png"))) == 3


@pytest.mark.parametrize("flag", ["--save-latents", "--save-steps"])
def test_the_picture_is_written_first(shell: Shell, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """When something beside the image cannot be written, the image is there already, and --json tells of it."""

    def fail(*_: object) -> None:
        raise Reason.FIELD_INVALID.error("the disk is full")

    monkeypatch.setattr(saved_state, "dump", fail)
    monkeypatch.setattr(side_outputs, "_write_step", fail)
    told = shell.json("a red fox", "-o", "fox.png", flag, "extra", code=2)

    assert told["error"]["message"] == "the disk is full"
    assert [image["path"] for image in told["images"]] == ["fox.png"]
    assert pixels("fox.png").shape == (32, 32, 3)


@pytest.mark.parametrize("at", ["2", "4", None])
def test_a_continued_picture_knows_its_beginning(shell: Shell, at: str | None) -> None:
    """An image that goes on from steps of the cloud says so, wherever its own steps run."""
    save = ["--save-latents", "s.npz", *(["--save-latents-at", at] if at else [])]
    shell("generate", "a red fox", "-o", "whole.png", "--split", "3,3", *save)
    (image,) = shell.json("--load-latents", "s.npz", "-o", "rest.png", "--mode", "edge")["images"]
    _, chunk, parameters = files.read_png(shell.folder / "rest.png")
    cloud_steps = min(int(at or 6), 3)

    assert chunk is not None
    assert parameters is not None
    assert (chunk["first_step"], chunk["earlier_cloud_steps"]) == (int(at or 6), cloud_steps)
    assert (chunk["mode"], chunk["cloud_model"]) == ("hybrid", "fake-large")
    assert chunk["handoff"] == {"planned": cloud_steps, "actual": cloud_steps, "reason": None}
    assert f"Hybrid mode: hybrid, Cloud steps: {cloud_steps}" in parameters
    assert image["steps"] == [{**image["steps"][i], "step": s} for i, s in enumerate(range(int(at or 6), 6))]
    refused = shell("generate", "--load-latents", "s.npz", "--save-latents", "t.npz", "--save-latents-at", "2", code=2)
    assert "leave it out" in refused.stderr


@pytest.mark.parametrize(
    ("split", "every", "shown"), [("2,2", "2", [2, 4]), ("4,0", "4", [4]), ("4,0", "3", [3]), ("0,4", "3", [3])]
)
def test_previews_count_steps(shell: Shell, split: str, every: str, shown: list[int]) -> None:
    """Of a solver with two calls a step, and one in the last, every N-th step is shown, the cloud's and the edge's."""
    arguments = ["--scheduler", "heun", "--split", split, "--preview-every", every, "-o", "fox.png"]
    shell("generate", "a red fox", *arguments)

    names = sorted(path.name for path in shell.folder.glob("*-preview-*"))
    assert names == [f"fox-preview-{step:03}.png" for step in shown]


@pytest.mark.parametrize("step", ["1", "2", "3", "5"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m"])
def test_saved_state_continues(shell: Shell, step: str, scheduler: str) -> None:
    """A state saved in the middle, in the cloud's part or the edge's, continues to the same image."""
    drawn = ["a red fox", "--seed", "3", "--scheduler", scheduler, "--codec", "fp32", "-o", "whole.png"]
    shell("generate", *drawn, "--split", "3,3", "--save-latents", "mid.npz", "--save-latents-at", step)
    (image,) = shell.json("--load-latents", "mid.npz", "--codec", "fp32", "-o", "rest.png")["images"]

    assert np.array_equal(pixels("whole.png"), pixels("rest.png"))
    assert len(image["steps"]) == 6 - int(step)
    assert image["prompt"] == "a red fox"


def test_final_latents_are_only_decoded(shell: Shell, fake: FakeCloud) -> None:
    """Final latents load as an image without a step; and a state does not take a prompt."""
    shell("generate", "a red fox", "-o", "a.png", "--save-latents", "final.npz")
    fake.requests.clear()
    (image,) = shell.json("--load-latents", "final.npz", "-o", "b.png")["images"]

    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert (image["steps"], fake.requests) == ([], [])
    assert "fixes --prompt" in shell("generate", "a dog", "--load-latents", "final.npz", code=2).stderr
    assert "is there already" in shell("generate", "a dog", "--save-latents", "final.npz", code=2).stderr


def test_initial_latents_replace_the_seed(shell: Shell) -> None:
    """Unit normal latents from a file begin the image in the cloud as well as here; a wrong shape is refused."""
    noise = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    np.savez("noise.npz", latents=noise)
    np.savez("wrong.npz", latents=noise[:, :2])
    np.save("bare.npy", noise)
    whole = Path("noise.npz").read_bytes()
    for name, content in (("empty", b""), ("zipped", whole[:90] + b"?" * 40 + whole[130:]), ("cut", whole[:-30])):
        Path(f"{name}.npz").write_bytes(content)
    Path("rubbish.npz").write_bytes(b"rubbish")
    for mode, name in (("hybrid", "a.png"), ("edge", "b.png")):
        first, second = (
            shell.json("a fox", "--mode", mode, "--seed", seed, "--load-latents", "noise.npz", "-o", f"{seed}{name}")
            for seed in ("1", "2")
        )
        assert np.array_equal(pixels(first["images"][0]["path"]), pixels(second["images"][0]["path"]))

    assert "must be [4, 4, 4]" in shell("generate", "a fox", "--load-latents", "wrong.npz", code=2).stderr
    for name in ("rubbish.npz", "empty.npz", "zipped.npz", "cut.npz", "bare.npy"):
        assert "cannot be loaded" in shell("generate", "a fox", "--load-latents", name, code=2).stderr


def test_previews_and_steps_become_pictures(shell: Shell) -> None:
    """--preview-every writes previews, --save-steps two images of every step, the cloud's and the edge's."""
    shell("generate", "a red fox", "--seed", "1", "--preview-every", "2", "--save-steps", "steps", "-o", "fox.png")
    steps = sorted(path.name for path in (shell.folder / "steps").iterdir())

    assert sorted(path.name for path in shell.folder.glob("fox-preview-*")) == [
        "fox-preview-002.png", "fox-preview-004.png", "fox-preview-006.png"
    ]  # fmt: skip
    assert steps == [
        f"fox-{call:03}-{'cloud' if call <= 3 else 'edge'}-{kind}.png"
        for call in range(1, 7)
        for kind in ("noisy", "x0")
    ]
    assert np.array_equal(pixels(shell.folder / "steps" / steps[-2]), pixels("fox.png"))
    (shell.folder / "fox.png").unlink()
    for extra in (["--preview-every", "2"], ["--save-steps", "steps"]):
        assert "is there already" in shell("generate", "a red fox", *extra, "-o", "fox.png", code=2).stderr


def test_rescaled_guidance_is_in_the_file(shell: Shell) -> None:
    """And in a dry run; the scheduler may be called as another tool calls it."""
    words = ("--mode", "edge", "--guidance-scale", "7", "--guidance-rescale", "0.7", "--scheduler", "DDIM Automatic")
    shell("generate", "a red fox", "--seed", "5", *words)
    _, provenance, parameters = files.read_png(shell.folder / "a-red-fox-5.png")
    told = json.loads(shell("generate", "a red fox", "--dry-run", *words).stdout)["images"][0]
    refused = shell("generate", "a fox", "--mode", "edge", "--guidance-rescale", "0.7", "--cfg-scale", "1", code=2)

    assert (told["guidance_rescale"], told["scheduler"]) == (0.7, "ddim")
    assert provenance is not None
    assert provenance["guidance_rescale"] == 0.7
    assert "CFG scale: 7, CFG rescale: 0.7" in str(parameters)
    assert "--guidance-rescale has no effect at --guidance-scale 1" in refused.stderr


def test_dry_run_does_nothing(shell: Shell, fake: FakeCloud) -> None:
    """--dry-run shows the request with its defaults filled in and the split, and asks nobody."""
    told = json.loads(shell("generate", "a red fox", "--dry-run", "--steps", "10", "--seed", "1").stdout)
    (image,) = told["images"]

    assert (image["cloud_steps"], image["edge_steps"], image["scheduler"]) == (5, 5, "ddim")
    assert (fake.requests, list(shell.folder.iterdir())) == ([], [])


def test_token_file(shell: Shell, fake: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token comes from a file or from the environment; without it the cloud says no."""
    fake.token = "open sesame"
    Path("token").write_text("open sesame\n")
    shell("generate", "a red fox", "--token-file", "token")
    shell("generate", "a red fox", code=3)
    monkeypatch.setenv("HYBRIDSD_EDGE_TOKEN", "open sesame")
    shell("generate", "a red fox")


def test_broken_bundle_is_named(shell: Shell, tmp_path: Path, bundle_folder: Path) -> None:
    """A file that was changed is found by its hash before anything is drawn; no bundle at all says how to get one."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in bundle_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "unet.onnx").write_bytes((bundle_folder / "unet.onnx").read_bytes()[:-1] + b"x")
    result = shell("generate", "a red fox", "--bundle", str(broken), code=2)
    missing = shell("generate", "a red fox", "--bundle", str(tmp_path / "none"), code=2)

    assert "unet.onnx does not match its SHA-256" in result.stderr
    assert "has no model.json" in missing.stderr
    assert "unet.onnx" in shell("bundle", "verify", "--bundle", str(broken), code=2).stdout


def test_doctor_is_content(shell: Shell) -> None:
    """Where all is well every line says so."""
    checks = json.loads(shell("doctor", "--json").stdout)
    lines = shell("doctor").stdout.splitlines()

    assert checks["ok"]
    names = ["cache", "bundle", "provider", "energy", "plans", "models", "cloud", "pairing"]
    found = [check["name"] for check in checks["checks"] if check["name"] not in ("memory", "speed")]  # of this machine
    assert found == names
    assert all(line.startswith("ok ") for line in lines)


@pytest.mark.parametrize(
    ("setting", "name", "code"), [({"token": "x"}, "cloud", 3), ({"latent_space": "sdxl"}, "pairing", 3)]
)
def test_doctor_finds_what_is_wrong(
    shell: Shell, fake: FakeCloud, setting: dict[str, str], name: str, code: int
) -> None:
    """The line that is wrong says what to do, and the exit code is that of the table."""
    for field, value in setting.items():
        setattr(fake, field, value)
    wrong = [line for line in shell("doctor", code=code).stdout.splitlines() if line.startswith("WRONG")]

    assert len(wrong) == 1
    assert name in wrong[0]


def test_doctor_says_which_model_would_have_to_be_loaded(shell: Shell, fake: FakeCloud) -> None:
    """Its first image waits for it; of one that is loaded, or of a server that does not say, nothing is said."""
    assert f"is that of {fake.model_id}\n" in shell("doctor").stdout
    fake.model_state = pb.MODEL_STATE_COLD
    assert f"is that of {fake.model_id} (cold)\n" in shell("doctor").stdout


def test_doctor_finds_a_cache_that_cannot_be_written(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder that is none is named, with the setting that changes it."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HYBRIDSD_EDGE_CACHE", str(tmp_path / "file" / "cache"))

    (wrong,) = [line for line in shell("doctor", code=70).stdout.splitlines() if line.startswith("WRONG")]
    assert "cache" in wrong
    assert "HYBRIDSD_EDGE_CACHE" in wrong


def test_doctor_without_a_cloud(shell: Shell, running: Running) -> None:
    """A cloud that is away is exit code 4, and none at all when it was not asked for."""
    running.server.stop(grace=None).wait()

    assert "hybridsd-cloud serve" in shell("doctor", code=4).stdout
    shell("doctor", "--offline")


def test_bundle_commands(shell: Shell, fake: FakeCloud, bundle_folder: Path) -> None:
    """A bundle can be looked at, checked, and fetched from the cloud; then it is found by its name."""
    fake.bundle = bundle_folder
    assert "tiny-test, 4 channels" in shell("bundle", "inspect").stdout
    assert json.loads(shell("bundle", "inspect", "--json").stdout)["name"] == "tiny-edge"
    assert "all as the manifest says" in shell("bundle", "verify").stdout
    assert "tiny-edge" in shell("bundle", "fetch").stdout
    folder = Path(shell("bundle", "fetch", "tiny-edge").stdout.strip())

    assert (folder / "unet.onnx").read_bytes() == (bundle_folder / "unet.onnx").read_bytes()
    assert "is there already" in shell("bundle", "fetch", "tiny-edge", code=2).stderr
    assert "it has: tiny-edge" in shell("bundle", "fetch", "other", code=3).stderr
    assert str(folder) in shell("bundle", "verify", "--bundle", "tiny-edge").stdout


def test_a_cloud_without_bundles_says_so(shell: Shell) -> None:
    """An empty list is explained, and standard output stays a list."""
    said = shell("bundle", "fetch")

    assert (said.stdout, "offers no bundles; its operator names them with --bundle" in said.stderr) == ("", True)


def test_interrupting_cancels_the_job(shell: Shell, fake: FakeCloud, running: Running, bundle_folder: Path) -> None:
    """Ctrl-C in the cloud's part stops the cloud's job too and exits with 130."""
    fake.hang_after_call = 1
    listen = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job in the background may not
    )
    command = [
        sys.executable,
        "-c",
        f"{listen}from edge_client.cli.main import main; main()",
        "generate",
        "fox",
        "--jsonl",
    ]
    command += ["--server", running.target, "--bundle", str(bundle_folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step_done" in line:
                process.send_signal(signal.SIGINT)
                break
        _, stderr = process.communicate(timeout=HANG_S)

    assert process.returncode == 130
    assert stderr == "Interrupted.\n"
    assert fake.cancel_seen.wait(HANG_S)


def test_help_and_version(shell: Shell) -> None:
    """Every command explains itself."""
    assert "hybridsd, version 0.1.0" in shell("--version").stdout
    for words in (["--help"], ["generate", "-h"], ["doctor", "-h"], ["bundle", "-h"], ["bundle", "fetch", "-h"]):
        assert "Usage:" in shell(*words).stdout


def test_a_bug_exits_with_70(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw is called a bug, without a traceback unless asked for."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(files, "encode_file", fail)

    assert "ZeroDivisionError: oh. This is a bug" in shell("generate", "a red fox", code=70).stderr


def test_an_automatic_split_explains_itself(shell: Shell, fake: FakeCloud) -> None:
    """Goals choose the split, the reckoning can be read, and a split that is given excludes them."""
    told = shell("generate", "a red fox", "--quality", "0.3", "--explain-split", "--overwrite")
    limited = shell("generate", "a red fox", "--max-cloud-steps", "1", "--max-latency", "60s", "--json", "--overwrite")

    assert "quality" in told.stderr
    assert any(line.startswith(">") for line in told.stderr.splitlines())
    assert json.loads(limited.stdout)["images"][0]["handoff"]["planned"] <= 1
    for arguments in (["--split", "2,4"], ["--cloud-steps", "2"], ["--mode", "edge"]):
        refused = shell("generate", "a red fox", "--quality", "0.5", *arguments, code=2)
        assert "fixes the split" in refused.stderr
    shell("generate", "a red fox", "--max-latency", "soon", code=2)


def test_without_a_cloud_an_automatic_split_is_the_edge(shell: Shell) -> None:
    """Nobody there is no error: the reckoning says so, and the edge draws alone."""
    told = shell("generate", "a red fox", "--cloud-steps", "auto", "--explain-split", "--server", "127.0.0.1:9")

    assert "the cloud is away" in told.stderr


def test_an_image_and_a_mask_come_from_files(shell: Shell, tmp_path: Path) -> None:
    """An image is begun with, in a size of its shape; what is wrong with it is said."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    Image.new("L", (40, 20), 255).save(tmp_path / "mask.png")
    Image.new("L", (40, 20), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no image")
    image = ["--image", str(tmp_path / "red.png"), "--mode", "edge", "--scheduler", "ddim"]
    told = shell("generate", "a red fox", *image, "--mask", str(tmp_path / "mask.png"), "--json", "--overwrite")

    drawn = json.loads(told.stdout)["images"][0]
    assert drawn["image"] == {"strength": 1.0, "mask": True}
    assert drawn["width"] > drawn["height"]
    for wrong, says in (
        ([*image, "--mask", str(tmp_path / "black.png")], "nothing would be drawn"),
        (["--image", str(tmp_path / "text.png")], "no image that can be read"),
        (["--strength", "0.5"], "--strength goes with --image"),
        ([*image, "--strength", "2"], "strength is 2"),
        (["--aspect", "wide"], "width:height"),
        (["--segments", "nonsense"], "MODEL:STEPS@PLACE"),
        (["--lora", "style:much"], "NAME:WEIGHT"),
        (["--cloud-skip", "many"], "WARMUP,SKIP"),
        (["--edge-skip", "adaptive:much"], "adaptive:TOLERANCE"),
        (["--edge-skip", "adaptive:0", "--mode", "edge"], "TOLERANCE of --edge-skip is 0"),
        (["--safety-checker", "blank", "--mode", "edge"], "no safety checker"),
    ):
        refused = shell("generate", "a red fox", *wrong, code=2)
        assert says in refused.stderr


def test_bench_says_where_the_time_goes(shell: Shell) -> None:
    """All numbers go into a file; without a cloud only the edge is timed."""
    told = shell("bench", "--runs", "2", "-o", "bench.json")
    record = json.loads((shell.folder / "bench.json").read_text())
    medians = record["medians"]

    assert "machine: " in told.stdout
    assert "cloud steps" in told.stdout
    assert len(record["runs"]) == 2
    assert medians["received_bytes"] > 0
    assert medians["edge_steps_s"] > 0
    shell("bench", "--mode", "edge", "--runs", "1", "-o", "alone.json")
    alone = json.loads((shell.folder / "alone.json").read_text())["medians"]
    assert (alone["received_bytes"], alone["cloud_steps_s"]) == (0, 0)
    assert alone["text_s"] > 0
    shell("bench", "--runs", "1", "-o", "nowhere/x.json", code=2)
    assert "--model is for the cloud" in shell("bench", "--mode", "edge", "--model", "large", code=2).stderr


def test_bench_counts_the_steps_that_were_asked_for(shell: Shell) -> None:
    """--steps and --cloud-steps are those of the image, not the bundle's."""
    shell("bench", "--runs", "1", "--steps", "4", "--mode", "edge", "-o", "edge.json")
    shell("bench", "--runs", "1", "--steps", "8", "--cloud-steps", "7", "-o", "both.json")
    records = [json.loads((shell.folder / name).read_text()) for name in ("edge.json", "both.json")]

    assert [(record["cloud_steps"], record["num_inference_steps"]) for record in records] == [(0, 4), (7, 8)]


def test_doctor_pairs_models_that_read_the_same_texts(shell: Shell, fake: FakeCloud) -> None:
    """A latent space in common is not enough: a model of another text width fits no bundle of this one."""
    fake.embed_shape = (8, 999)
    result = shell("doctor", code=3)

    assert "WRONG  pairing" in result.stdout
    assert "fake-large reads texts as 8 tokens of 999 features" in result.stdout
    fake.embed_shape = (0, 0)
    assert "ok     pairing" in shell("doctor").stdout


def test_patience_is_an_option(shell: Shell, fake: FakeCloud) -> None:
    """How long the cloud is waited for can be said in the command and in the environment."""
    fake.hang_after_call = 1
    result = shell("generate", "a fox", "--seed", "1", "--idle-timeout", "0.3", "-o", "fox.png")

    assert "has sent nothing for 0.3" in result.stderr
    assert "not in the range" in shell("generate", "a fox", "--queue-timeout", "0", code=2).stderr
