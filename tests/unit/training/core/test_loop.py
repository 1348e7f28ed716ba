"""The loop: resume, averaged weights, turns, stopping, and checkpoints that are whole or absent."""

import csv
import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tests.support.patience import HANG_S
from training.cli.shared_options import say
from training.core import checkpoints
from training.core.loop import CURVE_NAME, Run, Schedule, make_accelerator, train
from training.core.task import Batch, Drawn, Group, Task, normal


def draw_points(rng: np.random.Generator, batch_size: int) -> Batch:
    """Points to learn from."""
    return Batch(latents=torch.from_numpy(rng.standard_normal((batch_size, 1), dtype=np.float32)))


POINTS = Drawn(draw_points, seed=1)


class Line(Task):
    """Learns y = 2 x + 1 with one linear layer, with noise on y and dropout on x; a companion follows it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.learnt = self.linear = nn.Linear(1, 1)
        self.companions = nn.Linear(1, 1)
        self.saved: list[float] = []

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """The squared error."""
        del step
        x = batch.latents
        assert x is not None
        wanted = 2 * x + 1 + 0.01 * normal(rng, x.shape, x.device)
        return {"error": (self.linear(nn.functional.dropout(x, 0.01)) - wanted).square().mean()}

    def after_step(self, step: int) -> None:
        """Follows."""
        del step
        assert self.companions is not None
        with torch.no_grad():
            for follower, leader in zip(self.companions.parameters(), self.linear.parameters(), strict=True):
                follower.lerp_(leader, 0.1)

    def preview(self) -> NDArray[np.uint8]:
        """An image as bright as the weight."""
        return np.full((4, 4, 3), int(50 * abs(float(self.linear.weight))), dtype=np.uint8)

    def save(self, directory: Path) -> None:
        """Remembers what was to be saved."""
        del directory
        assert self.companions is not None
        self.saved += [float(self.linear.weight.detach()), float(self.companions.weight.detach())]


class Duel(Task):
    """Two layers that learn by turns; each loss has gradients for both."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.learnt = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})

    def groups(self) -> Mapping[str, Group]:
        """One group each; b is a thousand times slower."""
        return {
            "a": Group(list(self.learnt["a"].parameters())),
            "b": Group(list(self.learnt["b"].parameters()), lr_scale=1e-3),
        }

    def turn(self, step: int) -> str:
        """Every third step is b's."""
        return "b" if step % 3 == 2 else "a"

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """The output of both, named after the turn."""
        del rng
        return {self.turn(step): self.learnt["b"](self.learnt["a"](batch.latents)).square().mean()}

    def save(self, directory: Path) -> None:
        """Nothing is kept."""


SCHEDULE = Schedule(steps=60, batch_size=8, lr=0.1, warmup=5, ema_decay=0.9, weight_decay=0.0, precision="no")


def test_learns_and_writes_the_curve(tmp_path: Path) -> None:
    """The loss falls, and every row of the CSV is a number of steps further."""
    records = list(train(Run(Line(), POINTS, SCHEDULE), tmp_path))
    with (tmp_path / CURVE_NAME).open() as file:
        rows = list(csv.DictReader(file))

    assert records[-1].loss < records[0].loss / 100
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, accumulate: int) -> None:
    """Stopped after 24 steps and taken up by a new process' objects, a run reaches the same weights, bit for bit."""
    schedule = Schedule(steps=60, batch_size=8, lr=0.1, warmup=5, ema_decay=0.9, accumulate=accumulate, precision="no")
    whole = Line()
    uninterrupted = Run(whole, POINTS, schedule)
    losses = [record.losses for record in train(uninterrupted, tmp_path / "whole")]

    first = Run(Line(), POINTS, schedule)
    parts = []
    for record in train(first, tmp_path / "parts"):
        parts.append(record.losses)
        if record.step == 23:
            first.stop = True
    assert first.step == 24  # the step in hand is finished
    rest = Line()
    second = Run(rest, POINTS, schedule)
    assert second.resume(tmp_path / "parts")
    parts += [record.losses for record in train(second, tmp_path / "parts")]

    assert parts == losses
    assert rest.saved == whole.saved
    assert second.curve == uninterrupted.curve


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path) -> None:
    """Two passes of 4 move the weights as one pass of 8 points does."""

    class Plain(Line):
        def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
            del rng, step
            x = batch.latents
            assert x is not None
            return {"error": (self.linear(x) - (2 * x + 1)).square().mean()}

    points = np.random.default_rng(0).standard_normal((8, 1)).astype(np.float32)
    halves = iter([points[:4], points[4:]] * 3)
    together, apart = Plain(), Plain()
    options = {"steps": 3, "lr": 0.1, "warmup": 1, "precision": "no"}
    whole = Drawn(lambda rng, size: Batch(latents=torch.from_numpy(points)), 0)
    parts = Drawn(lambda rng, size: Batch(latents=torch.from_numpy(next(halves))), 0)
    list(train(Run(together, whole, Schedule(batch_size=8, **options)), tmp_path / "a"))  # type: ignore[arg-type]
    list(train(Run(apart, parts, Schedule(batch_size=4, accumulate=2, **options)), tmp_path / "b"))  # type: ignore[arg-type]

    assert apart.saved == pytest.approx(together.saved, rel=1e-5)


def test_a_stopped_run_saves_a_checkpoint_but_no_result(tmp_path: Path) -> None:
    """Half-learnt weights are never mistaken for learnt ones."""
    task = Line()
    run = Run(task, POINTS, SCHEDULE)
    for record in train(run, tmp_path):
        run.stop = record.step == 5

    assert checkpoints.read_state(checkpoints.checkpoints(tmp_path)[-1])["step"] == 6
    assert task.saved == []


def test_a_run_that_died_before_its_result_was_written_writes_it(tmp_path: Path) -> None:
    """All steps are in the checkpoint but the result is missing: the same command writes it, and only once."""

    class Unlucky(Line):
        def save(self, directory: Path) -> None:
            raise OSError("killed here")

    with pytest.raises(OSError, match="killed"):
        list(train(Run(Unlucky(), POINTS, SCHEDULE), tmp_path))
    saved = []
    for _ in range(2):
        task = Line()
        run = Run(task, POINTS, SCHEDULE)
        assert run.resume(tmp_path)
        assert list(train(run, tmp_path)) == []
        saved.append(len(task.saved))

    assert saved == [2, 0]


def test_the_average_is_what_is_saved(tmp_path: Path) -> None:
    """With a long memory the saved weight lags behind the last one."""
    task = Line()
    run = Run(task, POINTS, Schedule(steps=10, batch_size=8, lr=0.1, warmup=1, ema_decay=0.99, precision="no"))
    last = 0.0
    for _ in train(run, tmp_path):
        last = float(task.linear.weight.detach())

    assert task.saved[0] != last
    assert abs(task.saved[0] - 2) > abs(last - 2)


def test_only_the_group_whose_turn_it_is_moves(tmp_path: Path) -> None:
    """a stands still in b's steps and b in a's; b is as slow as its group says; the curve has both terms."""
    task = Duel()
    run = Run(task, POINTS, Schedule(steps=6, batch_size=8, lr=0.1, warmup=1, decay="constant", precision="no"))
    before = {name: float(layer.bias.detach()) for name, layer in task.learnt.items()}  # type: ignore[operator]
    moved = []
    for _ in train(run, tmp_path):
        after = {name: float(layer.bias.detach()) for name, layer in task.learnt.items()}  # type: ignore[operator]
        moved.append("".join(name for name in before if before[name] != after[name]))
        if moved[-1] == "b":
            assert abs(after["b"] - before["b"]) < 1e-3
        before = after

    assert moved == ["a", "a", "b", "a", "a", "b"]
    assert {"a", "b"} <= run.curve[0].keys()


def test_the_rate_rises_then_falls() -> None:
    """Linear warm-up to the named rate, then linearly down, along a cosine, or not at all."""
    schedule = Schedule(steps=100, batch_size=1, lr=1.0, warmup=10)
    rates = [schedule.lr_at(step) for step in range(100)]
    cosine = Schedule(steps=100, batch_size=1, lr=1.0, warmup=10, decay="cosine")
    constant = Schedule(steps=100, batch_size=1, lr=1.0, warmup=10, decay="constant")

    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) in (9, 10)
    assert rates[-1] == pytest.approx(1 / 90)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert cosine.lr_at(55) == pytest.approx(0.5)
    assert [constant.lr_at(step) for step in (4, 50, 99)] == pytest.approx([0.5, 1, 1])


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One bad batch must not destroy a run of hours."""

    class Broken(Line):
        def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
            return {"error": super().losses(batch, rng, step)["error"] * float("nan")}

    task = Broken()
    before = float(task.linear.weight.detach())
    list(train(Run(task, POINTS, Schedule(steps=2, batch_size=4, lr=0.1, precision="no")), tmp_path))

    assert float(task.linear.weight.detach()) == before
    assert "not finite" in caplog.text


def test_previews_show_the_averaged_weights_and_leave_the_run_as_it_was(tmp_path: Path) -> None:
    """An image every few steps, also in the last; with and without previews the run learns the same."""
    plain, shown = Line(), Line()
    list(train(Run(plain, POINTS, SCHEDULE), tmp_path / "plain"))
    schedule = Schedule(
        steps=60, batch_size=8, lr=0.1, warmup=5, ema_decay=0.9, weight_decay=0.0, precision="no", preview_every=25
    )
    list(train(Run(shown, POINTS, schedule), tmp_path / "shown"))

    assert sorted(path.name for path in (tmp_path / "shown/previews").iterdir()) == [
        "00000025.png", "00000050.png", "00000060.png"
    ]  # fmt: skip
    assert shown.saved == plain.saved
    last = np.asarray(Image.open(tmp_path / "shown/previews/00000060.png"))
    assert last[0, 0, 0] == int(50 * abs(shown.saved[0]))  # the averaged weight, which is what was saved


def test_curves_and_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    """Every term of the curve at its steps, and the validation image as it is."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    schedule = Schedule(steps=40, batch_size=8, lr=0.1, precision="no", preview_every=40)
    accelerator = make_accelerator("no", project=tmp_path, trackers=["tensorboard"])
    accelerator.init_trackers("curves")
    list(train(Run(Line(), POINTS, schedule, accelerator), tmp_path))
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "curves")).Reload()

    assert [event.step for event in events.Scalars("error")] == [20, 40]
    assert {"loss", "lr"} <= set(events.Tags()["scalars"])
    (picture,) = events.Images("preview")
    assert (picture.step, picture.width, picture.height) == (40, 4, 4)


def test_the_previous_checkpoint_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving fails, the message says what to do, the older checkpoint is whole, and no half one is left."""
    first = Run(Line(), POINTS, SCHEDULE)
    for record in train(first, tmp_path):
        first.stop = record.step == 9
    before = {path.name: path.read_bytes() for path in checkpoints.checkpoints(tmp_path)[-1].iterdir()}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    second = Run(Line(), POINTS, SCHEDULE)
    second.resume(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=r"disk is full; the one of step 10 is whole. Make room"):
        list(train(second, tmp_path))
    after = {path.name: path.read_bytes() for path in checkpoints.checkpoints(tmp_path)[-1].iterdir()}

    assert after == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """Two stay; a folder that is not whole is not one of them."""
    for step in (5, 10, 15):
        checkpoints.save(tmp_path, step, {"learnt": {"x": torch.ones(1)}}, {})
    (tmp_path / "checkpoint-00000099").mkdir()

    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-00000010", "checkpoint-00000015"]


def test_a_checkpoint_of_other_networks_is_refused(tmp_path: Path) -> None:
    """The message names the folder and what to do."""
    list(train(Run(Duel(), POINTS, SCHEDULE), tmp_path))

    with pytest.raises(ValueError, match="is of other networks than this recipe makes"):
        Run(Line(), POINTS, SCHEDULE).resume(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_size": 4}, r"made with batch_size 8 \(now 4\)"), ({"seed": 3}, "made with seed 0"), ({"lr": 0.5}, "")],
)
def test_what_would_be_another_run_is_refused(tmp_path: Path, change: dict[str, float], message: str) -> None:
    """Other batches or noise are not the same run; another rate is."""
    first = Run(Line(), POINTS, SCHEDULE)
    for record in train(first, tmp_path):
        first.stop = record.step == 5
    second = Run(Line(), POINTS, replace(SCHEDULE, **change))  # type: ignore[arg-type]
    if not message:
        assert second.resume(tmp_path)
        return
    with pytest.raises(ValueError, match=message):
        second.resume(tmp_path)


def test_a_longer_run_writes_its_result_anew(tmp_path: Path) -> None:
    """Steps may be raised; if writing the result fails then, the old one is not taken for it."""

    class Unlucky(Line):
        def save(self, directory: Path) -> None:
            raise OSError("killed here")

    list(train(Run(Line(), POINTS, SCHEDULE), tmp_path))
    longer = replace(SCHEDULE, steps=80)
    unlucky = Run(Unlucky(), POINTS, longer)
    unlucky.resume(tmp_path)
    with pytest.raises(OSError, match="killed"):
        list(train(unlucky, tmp_path))
    task = Line()
    again = Run(task, POINTS, longer)
    again.resume(tmp_path)

    assert again.step == 80
    assert list(train(again, tmp_path)) == []
    assert len(task.saved) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "foo"}, "decay is 'foo'; choose one of constant, linear, cosine"),
        ({"accumulate": 0}, "accumulate is 0; it must be in"),
        ({"lr": None}, "lr is None; it must be in"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; it must be in"),
    ],
)
def test_schedules_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    """The message names the field, the value and what it may be."""
    with pytest.raises(ValueError, match=message):
        replace(SCHEDULE, **change)  # type: ignore[arg-type]


def test_half_precision_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 without its scaler would be no float16 at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"fp16, which needs a GPU; give --precision auto, or bf16, or no"):
        make_accelerator("fp16")


def test_saying_something_leaves_the_precision_alone() -> None:
    """What people are told between two steps does not touch the run."""
    accelerator = make_accelerator("bf16")
    say("hello")

    assert accelerator.mixed_precision == "bf16"
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


class Loaded(Line):
    """A network that was loaded from a folder, as diffusers notes in its configuration."""

    def save(self, directory: Path) -> None:
        """Writes a configuration as `save_pretrained` does."""
        (directory / "vae").mkdir(parents=True)
        config = {"_name_or_path": str(Path.home() / "models/secret"), "width": 4}
        (directory / "vae" / "config.json").write_text(json.dumps(config))


def test_what_is_written_does_not_say_where_things_lie(tmp_path: Path) -> None:
    """Neither the result nor the checkpoints name a folder of this machine."""
    list(train(Run(Loaded(), POINTS, SCHEDULE), tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]

    assert json.loads((tmp_path / "vae" / "config.json").read_text()) == {"width": 4}
    assert len(files) > 4
    for secret in (str(tmp_path), str(Path.home()) + "/", str(Path.cwd())):
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_checkpoint_holds_no_pickles(tmp_path: Path) -> None:
    """Only safetensors and JSON."""
    list(train(Run(Line(), POINTS, SCHEDULE), tmp_path))
    suffixes = {path.suffix for path in checkpoints.checkpoints(tmp_path)[-1].iterdir()}

    assert suffixes == {".safetensors", ".json"}


SPLIT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.unit.training.core.test_loop import POINTS, SCHEDULE, Line
from training.core.loop import Run, train
run = Run(Line(), POINTS, SCHEDULE)
losses = [record.loss for record in train(run, Path(sys.argv[1]))]
said = f"{{run.workers}} {{run.rank}} {{float(run.task.linear.weight)}} {{losses[-1] < losses[0] / 10}}"
Path(f"{{sys.argv[1]}}/../said-{{run.rank}}").write_text(said)
"""


@pytest.mark.slow
def test_two_processes_learn_together(tmp_path: Path) -> None:
    """Two processes share each batch, end with the same weights and leave one checkpoint."""
    script = tmp_path / "split.py"
    script.write_text(SPLIT.format(root=str(Path(__file__).parents[4])))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", str(script), str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    said = [path.read_text().split() for path in sorted(tmp_path.glob("said-*"))]

    assert done.returncode == 0, done.stderr
    assert [[line[0], line[1], line[3]] for line in said] == [["2", "0", "True"], ["2", "1", "True"]]
    assert said[0][2] == said[1][2]
    assert len(checkpoints.checkpoints(tmp_path / "run")) == 1
