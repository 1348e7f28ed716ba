"""What a LoRA learns from: captions said for all, triggers, and pictures of the class beside."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from training.core.task import Batch
from training.data.subjects import Beside, Said, cover, with_trigger


class Plain:
    """Images whose every pixel is a number, of one size."""

    def __init__(self, value: float, size: tuple[int, int], captions: tuple[str, ...] = ()) -> None:
        self.value, self.size, self.captions = value, size, captions

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `Data`; the value grows with the batch's number."""
        number = start
        while True:
            images = torch.full((batch_size, 3, *self.size), float(self.value + number))
            yield Batch(captions=self.captions[:batch_size], images=images)
            number += 1


def test_one_thing_is_said_of_all() -> None:
    """Of pictures without captions, and of pictures that have some."""
    for captions in ((), ("a fox", "a cat")):
        said = Said(Plain(0, (8, 8), captions), lambda caption: f"sks {caption}".strip())
        batch = next(said.batches(batch_size=2, start=0, rank=0, workers=1))

        assert batch.captions == (("sks", "sks") if not captions else ("sks a fox", "sks a cat"))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("a fox", "sks, a fox"), ("A photo of SKS", "A photo of SKS"), ("", "sks")],
)
def test_a_trigger_is_said_once(caption: str, expected: str) -> None:
    """In front, where it is missing."""
    assert with_trigger("sks", caption) == expected


def test_pictures_of_the_class_are_behind_the_subjects() -> None:
    """As many, from the same batch on, cut to the subject's shape."""
    data = Beside(Plain(0, (16, 24), ("sks",) * 2), Said(Plain(100, (32, 32)), lambda _: "a dog"))
    batches = list(islice(data.batches(batch_size=2, start=3, rank=0, workers=1), 2))

    assert [batch.captions for batch in batches] == [("sks", "sks", "a dog", "a dog")] * 2
    assert [batch.images.shape for batch in batches] == [(4, 3, 16, 24)] * 2  # type: ignore[union-attr]
    assert batches[0].images[:, 0, 0, 0].tolist() == pytest.approx([3, 3, 103, 103])  # type: ignore[index]
    assert batches[1].images[:, 0, 0, 0].tolist() == pytest.approx([4, 4, 104, 104])  # type: ignore[index]


def test_the_middle_is_kept() -> None:
    """What is too wide is cut left and right, not squeezed."""
    image = torch.arange(8.0).expand(1, 3, 4, 8)

    assert torch.equal(cover(image, (4, 4)), image[..., 2:6])
    assert cover(image, (8, 8)).shape == (1, 3, 8, 8)
