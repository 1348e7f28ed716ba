"""Scenes: images, captions, and which pairs are held out."""

import itertools

import numpy as np
import pytest

from training.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    SIZE,
    TEMPLATES,
    Scene,
    background_colour,
    caption,
    draw,
    from_model_range,
    held_out_pairs,
    place,
    render,
    sample_scene,
    to_model_range,
)


def test_same_seed_gives_the_same_scene_caption_and_picture() -> None:
    """Everything random comes from the generator that is passed in."""

    def everything(seed: int) -> tuple[Scene, str, bytes]:
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        return scene, caption(scene, rng, free=0.5), render(scene, rng).tobytes()

    assert everything(3) == everything(3)
    assert everything(3) != everything(4)


def test_training_never_shows_a_held_out_pair() -> None:
    """A thousand training scenes hold no pair of the held-out set, and a thousand held-out scenes hold nothing else."""
    rng = np.random.default_rng(0)
    trained = {frozenset((s.first, s.second)) for s in (sample_scene(rng) for _ in range(1000)) if s.second}
    held_out = {
        frozenset((s.first, s.second)) for s in (sample_scene(rng, held_out=True) for _ in range(1000)) if s.second
    }

    assert trained.isdisjoint(held_out_pairs())
    assert held_out <= held_out_pairs()
    assert len(held_out) > 20


def test_every_object_occurs_in_training_beside_others() -> None:
    """Holding pairs out leaves every object with partners on both sides."""
    for name in OBJECTS:
        partners = sum(
            name in pair for pair in map(frozenset, itertools.combinations(OBJECTS, 2)) if pair not in held_out_pairs()
        )

        assert partners >= 15, name


@pytest.mark.parametrize("layout", ["beside", "stacked"])
def test_every_phrasing_names_the_objects_in_an_order_that_fits_its_words(layout: str) -> None:
    """A phrasing that says "left", "above" or their like of its first noun names the first object first."""
    of_first = ("left of", "to the left of", "above", "on top of", "over")
    of_second = ("right of", "below", "under", "beneath")
    for template in TEMPLATES[layout]:  # type: ignore[index]
        text = template.format(a="A", b="B", a0="A")
        a_first = text.index("A") < text.index("B")
        relation = text.replace("A", "").replace("B", "").strip()
        if relation.endswith(of_first):
            assert a_first, text
        elif relation.endswith(of_second):
            assert not a_first, text


def test_caption_is_true_of_the_picture() -> None:
    """Where the caption says an object stands, the image differs from its background, and centres are in order."""
    rng = np.random.default_rng(5)
    for layout in ("beside", "stacked"):
        scene = Scene(layout, "fox", "donut", "blue")  # type: ignore[arg-type]
        first, second = place(scene, rng)
        image = draw((first, second), background_colour(scene, rng)).astype(int)
        axis = (first.x, second.x) if layout == "beside" else (first.y, second.y)

        assert axis[0] + 30 < axis[1]
        for item in (first, second):
            patch = image[round(item.y) - 8 : round(item.y) + 8, round(item.x) - 8 : round(item.x) + 8]
            assert np.abs(patch - BACKGROUNDS["blue"]).mean() > 40


def test_the_first_object_is_the_one_drawn_on_the_left() -> None:
    """Swapping the objects of a scene swaps the halves of the image, up to where exactly they stand."""
    red, green = "strawberry", "cactus"

    def redness(scene: Scene) -> tuple[float, float]:
        image = render(scene, np.random.default_rng(1)).astype(float)
        excess = image[..., 0] - image[..., 1]
        return float(excess[:, : SIZE // 2].mean()), float(excess[:, SIZE // 2 :].mean())

    left, right = redness(Scene("beside", red, green, "gray"))
    swapped_left, swapped_right = redness(Scene("beside", green, red, "gray"))

    assert left > right
    assert swapped_left < swapped_right


def test_objects_stay_inside_and_apart() -> None:
    """No object leaves the image and no two overlap, whatever the draw."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        placed = place(sample_scene(rng), rng)
        for item in placed:
            assert item.side / 2 <= min(item.x, item.y, SIZE - item.x, SIZE - item.y) + 6
        if len(placed) == 2:
            a, b = placed
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.side + b.side) / 2


def test_backgrounds_stay_nearest_to_their_own_colour() -> None:
    """The slight variation never turns one background into another."""
    rng = np.random.default_rng(3)
    centres = np.array(list(BACKGROUNDS.values()))
    for index, colour in enumerate(COLOURS):
        for _ in range(50):
            drawn = background_colour(Scene("single", "fox", None, colour), rng)
            assert np.abs(centres - drawn).sum(axis=1).argmin() == index


def test_a_scene_of_one_object_has_no_second() -> None:
    """A layout that does not go with the number of objects is refused."""
    with pytest.raises(ValueError, match="layout 'single'"):
        Scene("single", "fox", "cat", "blue")


def test_model_range_is_undone() -> None:
    """Going to [-1, 1] and back loses nothing."""
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)

    assert to_model_range(images).min() == -1
    assert to_model_range(images).max() == 1
    assert np.array_equal(from_model_range(to_model_range(images)), images)
