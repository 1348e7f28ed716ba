"""Scenes: images, captions, and what is held out."""

from itertools import combinations

import numpy as np
import pytest

from training.data.scenes import (
    BACKGROUNDS,
    CELL,
    KINDS,
    NATURAL,
    QUADRANTS,
    SIZE,
    SIZE_WORDS,
    SIZES,
    TINTS,
    Scene,
    Thing,
    background_colour,
    caption,
    draw,
    from_model_range,
    held_out_pairs,
    held_out_tints,
    is_held_out,
    place,
    render,
    sample_scene,
    to_model_range,
)


def scene_of(*things: tuple[str, str, str, int], background: str = "blue") -> Scene:
    """Makes a scene of (kind, tint, size, quadrant)."""
    return Scene(tuple(Thing(*thing) for thing in things), background)  # type: ignore[arg-type]


def test_same_seed_gives_the_same_scene_caption_and_image() -> None:
    """Everything random comes from the generator that is passed in."""

    def everything(seed: int) -> tuple[Scene, str, bytes]:
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        return scene, caption(scene, rng, free=0.5), render(scene, rng).tobytes()

    assert everything(3) == everything(3)
    assert everything(3) != everything(4)


def test_training_never_shows_what_is_held_out() -> None:
    """A thousand training scenes hold no held-out pair or tint; every held-out scene has three objects and one such."""
    rng = np.random.default_rng(0)
    trained = [sample_scene(rng) for _ in range(1000)]
    held_out = [sample_scene(rng, held_out=True) for _ in range(200)]

    assert not any(is_held_out(scene) for scene in trained)
    assert all(is_held_out(scene) and len(scene.things) == 3 for scene in held_out)
    assert {len(scene.things) for scene in trained} == {1, 2, 3}


def test_every_kind_keeps_partners_and_a_tint_to_learn_from() -> None:
    """Holding things out leaves every kind most of its partners, and its natural look with another tint."""
    for kind in KINDS:
        partners = sum(kind in pair for pair in combinations(sorted(KINDS), 2) if pair not in held_out_pairs())
        tints = [tint for tint in TINTS if (kind, tint) not in held_out_tints()]

        assert partners >= len(KINDS) * 0.7, kind
        assert NATURAL in tints
        assert len(tints) >= 2, kind


def test_training_follows_zipf_and_judging_does_not() -> None:
    """The first kinds are seen many times as often as the last in training, and as often where models are judged."""
    rng = np.random.default_rng(1)

    def share_of_first_half(held_out: bool) -> float:
        kinds = [thing.kind for _ in range(1500) for thing in sample_scene(rng, held_out=held_out).things]
        return float(np.mean([KINDS.index(kind) < len(KINDS) // 2 for kind in kinds]))

    assert share_of_first_half(False) > 0.65
    assert 0.4 < share_of_first_half(True) < 0.6


@pytest.mark.parametrize("free", [0.0, 1.0])
def test_every_caption_names_all_that_is_there_and_where(free: float) -> None:
    """Kind, tint and a word of the size stand in the caption in one phrase with their own quadrant and no other."""
    rng = np.random.default_rng(7)
    for _ in range(200):
        scene = sample_scene(rng)
        text = caption(scene, rng, free=free)
        assert text.count("natural") == 0
        for thing in scene.things:
            assert thing.kind in text
            assert QUADRANTS[thing.quadrant] in text
            assert thing.tint == NATURAL or thing.tint in text
            assert any(word in text for word in SIZE_WORDS[thing.size])
        assert free or text.endswith(f"{scene.background} background")


def test_canonical_captions_read_as_english() -> None:
    """One phrase for each thing, joined by a comma and "and"."""
    scene = scene_of(("fox", NATURAL, "small", 0), ("donut", "bronze", "large", 3), background="orange")
    texts = {caption(scene, np.random.default_rng(seed)) for seed in range(8)}

    assert texts == {
        "a small fox at the top left and a large bronze donut at the bottom right on an orange background",
        "a large bronze donut at the bottom right and a small fox at the top left on an orange background",
    }


def test_each_object_is_drawn_in_its_own_quadrant_and_nowhere_else() -> None:
    """The image differs from its background in the quadrants of its things only, and everything stays inside them."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = sample_scene(rng)
        placed, colour = place(scene, rng), background_colour(scene, rng)
        different = np.abs(draw(placed, colour).astype(int) - np.rint(colour)).max(axis=-1) > 8
        half = SIZE // 2
        drawn = [
            bool(different[row * half : (row + 1) * half, column * half : (column + 1) * half].any())
            for row, column in (divmod(quadrant, 2) for quadrant in range(4))
        ]
        assert drawn == [quadrant in {thing.quadrant for thing in scene.things} for quadrant in range(4)]


def test_an_object_is_drawn_alike_wherever_it_stands() -> None:
    """Objects stand on the grid of the latents, so that one of a size looks the same at every place it can have."""
    rng = np.random.default_rng(2)
    for size in SIZES:
        images, places = [], set()
        for _ in range(60):
            (item,) = placed = place(scene_of(("fox", NATURAL, size, 3)), rng)
            image = draw(placed, np.zeros(3, np.float32))
            places.add((item.x, item.y))
            images.append(np.roll(image, (SIZE - round(item.y), SIZE - round(item.x)), axis=(0, 1)))
        assert len(places) == {"small": 16, "large": 4}[size]
        assert all(np.array_equal(image, images[0]) for image in images)
        assert len({(x % CELL, y % CELL) for x, y in places}) == 1


def test_a_tint_turns_an_object_to_its_hue() -> None:
    """The mean colour of a tinted object is nearest to its own tint; the natural one is as the glyph is."""
    names = [name for name in TINTS if name != NATURAL]
    hues = np.array([TINTS[name] for name in names], float)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    for index, tint in enumerate(names):
        image = draw(place(scene_of(("cat", tint, "large", 0)), np.random.default_rng(1)), np.zeros(3, np.float32))
        mean = image[:64, :64].reshape(-1, 3).mean(axis=0)
        assert (hues @ mean).argmax() == index


def test_backgrounds_stay_nearest_to_their_own_colour() -> None:
    """The slight variation never turns one background into another."""
    rng = np.random.default_rng(3)
    centres = np.array(list(BACKGROUNDS.values()))
    for index, background in enumerate(BACKGROUNDS):
        scene = scene_of(("fox", NATURAL, "small", 0), background=background)
        for _ in range(50):
            assert np.abs(centres - background_colour(scene, rng)).sum(axis=1).argmin() == index


@pytest.mark.parametrize("quadrants", [(), (0, 0), (2, 1), (0, 4), (0, 1, 2, 3)])
def test_quadrants_that_cannot_be_are_refused(quadrants: tuple[int, ...]) -> None:
    """No object, two in one place, out of order, out of range, and four are refused by name."""
    with pytest.raises(ValueError, match="the quadrants are"):
        scene_of(*[("fox", NATURAL, "small", quadrant) for quadrant in quadrants])


def test_model_range_is_undone() -> None:
    """Going to [-1, 1] and back loses nothing."""
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)

    assert to_model_range(images).min() == -1
    assert to_model_range(images).max() == 1
    assert np.array_equal(from_model_range(to_model_range(images)), images)
