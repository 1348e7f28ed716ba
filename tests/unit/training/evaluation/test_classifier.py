"""The judge: what it is taught to take for no kind, what it then does, and what it says of its own errors."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.data.scenes import to_model_range
from training.evaluation import classifier as judge
from training.evaluation.classifier import NEITHER, SPOILT, Classifier, ClassifierTask, spoilt_scene

KIND_COLUMNS = [0, 3, 6, 9]


def spoilt(way: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels int64 [N, 13] and images float32 [N, 3, 128, 128] of scenes whose first object is spoilt."""
    rng = np.random.default_rng(seed)
    drawn = [spoilt_scene(rng, way) for _ in range(count)]
    images = torch.from_numpy(to_model_range(np.stack([image for _, image in drawn])))
    return torch.tensor([label for label, _ in drawn]), images


@pytest.mark.parametrize("way", [*SPOILT, "missing"])
def test_a_spoilt_object_is_labelled_as_no_kind(way: str) -> None:
    """One object is neither, or is not there; its attributes go with it, and the image is not blank."""
    labels, images = spoilt(way, 6, 0)
    neither = (labels[:, KIND_COLUMNS] == NEITHER).sum(dim=1)

    assert neither.tolist() == [0 if way == "missing" else 1] * 6
    if way == "missing":
        gone = labels[:, KIND_COLUMNS] == 0
        assert bool((gone == (labels[:, [1, 4, 7, 10]] == 0)).all())
    else:
        assert float(images.std(dim=(2, 3)).amax(dim=1).min()) > 0.01


def test_a_smear_has_no_edges_and_what_stands_beside_it_has() -> None:
    """The steepest change of a smear is far below that of the objects that were left sharp."""
    rng = np.random.default_rng(1)
    label, image = next(found for found in (spoilt_scene(rng, "smeared", held_out=True) for _ in range(9)))
    steep = []
    for quadrant in range(4):
        row, column = divmod(quadrant, 2)
        part = image[64 * row + 8 : 64 * row + 56, 64 * column + 8 : 64 * column + 56].astype(float)
        steep.append(np.abs(np.diff(part, axis=0)).max())
    kinds = [label[column] for column in KIND_COLUMNS]
    smear = steep[kinds.index(NEITHER)]
    sharp = [value for value, kind in zip(steep, kinds, strict=True) if 0 < kind < NEITHER]

    assert 0 < smear < 30
    assert min(sharp) > 60


@pytest.mark.slow
def test_a_judge_learns_to_take_smears_for_neither_and_gaps_for_nothing() -> None:
    """After a minute's lessons on smears, gaps and whole objects, a small judge tells these three apart."""
    torch.manual_seed(0)
    network = Classifier(8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(60):
        rng = np.random.default_rng((1, step))
        drawn = [spoilt_scene(rng, ("smeared", "missing")[index % 2]) for index in range(24)]
        labels = torch.tensor([label for label, _ in drawn])
        logits = network(torch.from_numpy(to_model_range(np.stack([image for _, image in drawn]))))
        loss = torch.stack([F.cross_entropy(logits[column], labels[:, column]) for column in KIND_COLUMNS]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    labels, images = spoilt("smeared", 64, 99)
    read = network.read(images)[:, KIND_COLUMNS]
    kinds = labels[:, KIND_COLUMNS]

    assert float((read == NEITHER)[kinds == NEITHER].float().mean()) > 0.7
    assert float((read == 0)[kinds == 0].float().mean()) > 0.9
    assert float((read == NEITHER)[(kinds > 0) & (kinds < NEITHER)].float().mean()) < 0.3


class Reader(Classifier):
    """A judge that says of every quadrant the same."""

    def __init__(self, kind: int) -> None:
        super().__init__(8)
        self.kind = kind

    def read(self, images: Tensor) -> Tensor:
        """Says one kind everywhere."""
        found = torch.zeros(len(images), 13, dtype=torch.int64)
        found[:, KIND_COLUMNS] = self.kind
        return found


def test_the_judges_own_errors_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that always says neither recognizes all smears and no gaps; one that says nothing, the other way round."""
    monkeypatch.setattr(judge, "round_trip", lambda vae, images: images)
    found = {}
    for kind in (NEITHER, 0):
        task = ClassifierTask(Reader(kind), cast(AutoencoderKL, torch.nn.Identity()), judged=8)
        task.save(tmp_path / str(kind))
        found[kind] = cast(dict[str, Any], json.loads((tmp_path / str(kind) / "accuracy.json").read_text()))

    assert set(found[0]) == {"renders", "vae_round_trip", *SPOILT, "missing", "judged"}
    assert [found[NEITHER][way] for way in (*SPOILT, "missing")] == [1, 1, 1, 0]
    assert [found[0][way] for way in (*SPOILT, "missing")] == [0, 0, 0, 1]
