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
from training.core.checkpoints import Keeping
from training.core.curve import GRAD_NORM, means
from training.core.loop import CURVE_NAME, PATIENCE, DivergedError, Run, Schedule, make_accelerator, train
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


class Breaking(Line):
    """From step `when` on, until step `until`, no gradient is finite."""

    def __init__(self, when: int, until: int = 10**9) -> None:
        super().__init__()
        self.when, self.until = when, until

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """The squared error, or no number."""
        error = super().losses(batch, rng, step)["error"]
        return {"error": error * float("nan") if self.when <= step < self.until else error}


def test_a_run_that_learns_nothing_more_ends(tmp_path: Path) -> None:
    """After so many steps in a row without a finite gradient, with what to do, and without a checkpoint of them."""
    task = Breaking(10)
    run = Run(task, POINTS, SCHEDULE)
    with pytest.raises(DivergedError, match=r"(?s)20 steps .*weights are still finite.*lower schedule\.lr"):
        list(train(run, tmp_path, keeping=Keeping(steps=10)))

    assert run.step == 10 + PATIENCE - 1
    assert task.saved == []
    assert checkpoints.read_state(checkpoints.checkpoints(tmp_path)[-1])["step"] == 20


def test_steps_without_a_gradient_now_and_then_do_not_end_a_run(tmp_path: Path) -> None:
    """Only those in a row count; their norm is told, and is in no mean."""
    run = Run(Breaking(10, 10 + PATIENCE - 1), POINTS, SCHEDULE)
    records = list(train(run, tmp_path))

    assert run.step == 60
    assert [not np.isfinite(record.grad_norm) for record in records].count(True) == PATIENCE - 1
    assert all(np.isfinite(row[GRAD_NORM]) for row in run.curve)


def test_the_curve_has_the_gradient_norm(tmp_path: Path) -> None:
    """Before it is clipped; it is no part of the loss."""
    records = list(train(Run(Line(), POINTS, replace(SCHEDULE, max_grad_norm=1e-3)), tmp_path))
    with (tmp_path / CURVE_NAME).open() as file:
        row = next(csv.DictReader(file))

    assert float(row["grad_norm"]) == pytest.approx(np.mean([record.grad_norm for record in records[:20]]))
    assert float(row["grad_norm"]) > 1e-3
    assert float(row["loss"]) == pytest.approx(float(row["error"]))


def test_means_never_add_terms_of_different_steps() -> None:
    """Where networks take turns, the loss is the mean of the steps' own."""
    found = means([{"a": 1.0, GRAD_NORM: 2.0}, {"b": 10.0, GRAD_NORM: float("inf")}, {"a": 3.0, "c": 2.0}])

    assert found == {"loss": pytest.approx(16 / 3), "a": 2.0, GRAD_NORM: 2.0, "b": 10.0, "c": 2.0}
    assert means([]) == {}


HELD_OUT = Drawn(draw_points, seed=2)


def test_validation_losses_are_of_the_averaged_weights_and_fixed_samples(tmp_path: Path) -> None:
    """They fall, are the same for the same weights, go to a file, and leave the run as it was."""
    plain, shown = Line(), Line()
    list(train(Run(plain, POINTS, SCHEDULE), tmp_path / "plain"))
    run = Run(shown, POINTS, replace(SCHEDULE, validate_every=25), held_out=HELD_OUT)
    records = list(train(run, tmp_path / "shown"))
    with (tmp_path / "shown" / "validation.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    told = [record.validation for record in records if record.validation is not None]
    now = run.validate()

    assert shown.saved == plain.saved
    assert [row["step"] for row in rows] == [25, 50, 60]
    assert [row["loss"] for row in rows] == [each["loss"] for each in told]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert now == told[-1]  # the averaged weights are what was put into the networks at the end


def test_validation_goes_on_where_a_run_is_taken_up(tmp_path: Path) -> None:
    """The rows before are kept, and those after are what they would have been."""
    schedule = replace(SCHEDULE, validate_every=10)
    whole = Run(Line(), POINTS, schedule, held_out=HELD_OUT)
    list(train(whole, tmp_path / "whole"))
    first = Run(Line(), POINTS, schedule, held_out=HELD_OUT)
    for record in train(first, tmp_path / "parts"):
        first.stop = record.step == 34
    second = Run(Line(), POINTS, schedule, held_out=HELD_OUT)
    second.resume(tmp_path / "parts")
    list(train(second, tmp_path / "parts"))

    assert second.validation == whole.validation


def test_each_turn_is_validated(tmp_path: Path) -> None:
    """The terms of all networks that take turns, on all samples."""
    schedule = Schedule(steps=4, batch_size=8, lr=0.1, precision="no", validate_every=2)
    run = Run(Duel(), POINTS, schedule, held_out=HELD_OUT)
    list(train(run, tmp_path))

    assert [set(row) for row in run.validation] == [{"step", "loss", "a", "b"}] * 2
    assert run.validation[0]["a"] == run.validation[0]["b"]  # one and the same output


@pytest.mark.parametrize(
    ("keeping", "steps"),
    [
        (Keeping(steps=20), [40, 60]),
        (Keeping(steps=25, keep=5), [25, 50, 60]),
        (Keeping(seconds=1e6, keep=5), [60]),
        (Keeping(), [60]),
    ],
)
def test_checkpoints_come_and_stay_as_told(tmp_path: Path, keeping: Keeping, steps: list[int]) -> None:
    """Every so many steps, or seconds, and at the end; the newest stay."""
    list(train(Run(Line(), POINTS, SCHEDULE), tmp_path, keeping=keeping))

    assert [checkpoints.read_state(path)["step"] for path in checkpoints.checkpoints(tmp_path)] == steps


def test_checkpoints_that_take_long_come_less_often() -> None:
    """Unless an interval was given, they take a twentieth of the time at most."""
    keeping = Keeping()

    assert keeping.is_due(step=1, since_s=121, last_took_s=1)
    assert not keeping.is_due(step=1, since_s=599, last_took_s=30)
    assert keeping.is_due(step=1, since_s=600, last_took_s=30)
    assert Keeping(seconds=60).is_due(step=1, since_s=60, last_took_s=30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seconds": 1, "steps": 1}, "give one of them"),
        ({"keep": 0}, "keep is 0; it must be in"),
        ({"steps": 0}, "steps is 0; it must be in"),
    ],
)
def test_checkpoints_that_cannot_be_are_refused(given: dict[str, int], message: str) -> None:
    """The message names what is wrong."""
    with pytest.raises(ValueError, match=message):
        Keeping(**given)


class Written(Line):
    """Writes its weights."""

    def save(self, directory: Path) -> None:
        """One number."""
        directory.mkdir(parents=True)
        (directory / "weight.json").write_text(json.dumps(float(self.linear.weight.detach())))


def test_a_checkpoint_is_exported_as_if_the_run_ended_there(tmp_path: Path) -> None:
    """The same averaged weights as those of a run of so many steps; the run goes on as if nothing had been."""
    constant = replace(SCHEDULE, decay="constant")
    list(train(Run(Written(), POINTS, constant), tmp_path / "long", keeping=Keeping(steps=30)))
    list(train(Run(Written(), POINTS, replace(constant, steps=30)), tmp_path / "short"))
    checkpoint = checkpoints.at_step(tmp_path / "long", 30)
    done = Run(Written(), POINTS, constant).export(checkpoint, tmp_path / "exported")
    read = [json.loads((tmp_path / name / "weight.json").read_text()) for name in ("exported", "short", "long")]

    assert done == 30
    assert read[0] == read[1] != read[2]
    with pytest.raises(ValueError, match="exported has files already; choose a folder that is empty"):
        Run(Written(), POINTS, constant).export(checkpoint, tmp_path / "exported")
    with pytest.raises(ValueError, match=r"no checkpoint of step 31; choose one of 30, 60"):
        checkpoints.at_step(tmp_path / "long", 31)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        checkpoints.at_step(tmp_path, None)


def test_a_run_of_an_older_version_is_taken_up(tmp_path: Path) -> None:
    """Its state knows nothing of validation and of gradient norms."""
    first = Run(Line(), POINTS, SCHEDULE)
    for record in train(first, tmp_path):
        first.stop = record.step == 29
    path = checkpoints.latest(tmp_path)
    assert path is not None
    state = checkpoints.read_state(path)
    del state["validation"], state["schedule"]["validate_every"]
    state["pending"] = [{"error": row["error"]} for row in state["pending"]]
    (path / "state.json").write_text(json.dumps(state))
    second = Run(Line(), POINTS, SCHEDULE)

    assert second.resume(tmp_path)
    list(train(second, tmp_path))
    assert [row["step"] for row in second.curve] == [20, 40, 60]


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
from training.cli.main import _leave_together
from tests.unit.training.core.test_loop import POINTS, SCHEDULE, Line
from training.core.loop import Run, train
run = Run(Line(), POINTS, SCHEDULE)
losses = [record.loss for record in train(run, Path(sys.argv[1]))]
said = f"{{run.workers}} {{run.rank}} {{run.task.linear.weight.item()}} {{losses[-1] < losses[0] / 10}}"
Path(f"{{sys.argv[1]}}/../said-{{run.rank}}").write_text(said)
_leave_together()  # as the command does: a process aborts whose threads are still there at the end
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
