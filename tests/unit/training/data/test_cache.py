"""The cache of latents and text embeddings: the same losses, without encoding; resumed, shared, refused."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from tests.support import chain
from tests.support.pictures import small_recipe, write_pictures, write_shards
from tests.support.tiny_pipeline import write_tiny_pipeline
from training.cli.main import main
from training.data import encode
from training.data.cache import Writer, identity
from training.models.components import load_text, load_vae

COUNT = 10


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    found = {kind: write_tiny_pipeline(folder / kind, kind=kind) for kind in ("sd1", "sdxl")}  # type: ignore[arg-type]
    return found.__getitem__


def settings(pipeline: Path, spec: str, cache: Path, *more: str) -> list[str]:
    return [
        f"teacher={pipeline}", f"data.spec={spec}", f"data.cache={cache}", "schedule.precision=no",
        "data.resolution=64", "data.loader_workers=0", "data.bucket_multiple=16", *more,
    ]  # fmt: skip


def fill(name: str, fields: list[str], *options: str) -> Result:
    """Runs the command cache."""
    words = [word for entry in fields for word in ("--set", entry)]
    return CliRunner().invoke(main, ["cache", name, *options, *words])


def nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was run that the cache stands for")

    monkeypatch.setattr(AutoencoderKL, "encode", never)
    monkeypatch.setattr(CLIPTextModel, "forward", never)


@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        ("sd1", "sd-distill", ["data.buckets=True", "schedule.steps=12", "caption_dropout=0.3"]),
        ("sdxl", "sd-distill", ["data.buckets=True", "schedule.steps=12", "caption_dropout=0.3"]),
        ("sd1", "sd-lcm", ["data.crop=random", "data.cached_crops=2", "schedule.steps=8"]),
        ("sdxl", "sd-lcm-lora", ["data.flip=False"]),
    ],
)
def test_losses_are_the_same_with_and_without(
    kind: str,
    name: str,
    more: list[str],
    pipelines: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the same seeds, over the end of an epoch, with crops, flips, dropped captions and a broken picture."""
    spec, cache = write_pictures(tmp_path / "pictures", COUNT), tmp_path / "cache"
    (tmp_path / "pictures" / "3.png").write_bytes((tmp_path / "pictures" / "3.png").read_bytes()[:200])
    plain = chain.losses(small_recipe(name, pipelines(kind), spec, *more), tmp_path / "plain")

    made = fill(name, settings(pipelines(kind), spec, cache, *more), "--dtype", "float32")
    assert made.exit_code == 0, made.output
    nothing_is_encoded(monkeypatch)
    cached = chain.losses(small_recipe(name, pipelines(kind), spec, *more, f"data.cache={cache}"), tmp_path / "cached")

    assert [list(step.values()) for step in cached] == [
        pytest.approx(list(step.values()), rel=1e-5, abs=1e-9) for step in plain
    ]


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_half_precision_is_near(kind: str, pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """What is stored by default differs by its last digits."""
    spec = write_pictures(tmp_path, COUNT) if kind == "csv" else write_shards(tmp_path, COUNT)
    plain = chain.losses(small_recipe("sd-distill", pipelines("sd1"), spec), tmp_path / "plain")
    made = fill("sd-distill", settings(pipelines("sd1"), spec, tmp_path / "cache"))
    recipe = small_recipe("sd-distill", pipelines("sd1"), spec, f"data.cache={tmp_path / 'cache'}")
    cached = chain.losses(recipe, tmp_path / "cached")

    assert made.exit_code == 0, made.output
    assert [step["task"] for step in cached] == pytest.approx([step["task"] for step in plain], rel=5e-3)


def test_networks_stay_where_they_are(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """The loop moves to its device, and checkpoints know, only what is run."""
    spec = write_pictures(tmp_path, COUNT)
    assert fill("sd-distill", settings(pipelines("sd1"), spec, tmp_path / "cache")).exit_code == 0
    with_cache, _ = small_recipe("sd-distill", pipelines("sd1"), spec, f"data.cache={tmp_path / 'cache'}").build(
        tmp_path
    )
    without, _ = small_recipe("sd-distill", pipelines("sd1"), spec).build(tmp_path)

    assert [type(network).__name__ for network in without.frozen] == [
        "UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL",
    ]  # fmt: skip
    assert [type(network).__name__ for network in with_cache.frozen] == ["UNet2DConditionModel"]


def test_validation_pictures_are_encoded_beside_a_cache(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """They are in no cache, and give the losses that they give without one."""
    spec, held_out = write_pictures(tmp_path / "pictures", COUNT), write_pictures(tmp_path / "held-out", 4)
    assert fill("sd-distill", settings(pipelines("sd1"), spec, tmp_path / "cache")).exit_code == 0
    found = []
    for cache in ([], [f"data.cache={tmp_path / 'cache'}"]):
        recipe = small_recipe("sd-distill", pipelines("sd1"), spec, f"data.validation={held_out}", *cache)
        task, _ = recipe.build(tmp_path)
        batch = next(recipe.held_out(tmp_path).batches(batch_size=4, start=0, rank=0, workers=1))
        losses = task.losses(batch, np.random.default_rng(0), 0)
        found.append({name: float(loss.detach()) for name, loss in losses.items()})

    assert found[0] == pytest.approx(found[1])


@pytest.fixture
def made(pipelines: Callable[[str], Path], tmp_path: Path) -> tuple[Path, str, Path]:
    """A pipeline, pictures, and their cache."""
    spec, cache = write_pictures(tmp_path / "pictures", COUNT), tmp_path / "cache"
    assert fill("sd-distill", settings(pipelines("sd1"), spec, cache)).exit_code == 0
    return pipelines("sd1"), spec, cache


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts images that the VAE encodes, and captions that are embedded."""
    counts: Counter[str] = Counter()
    posterior, embed = encode.posterior, CLIPTextModel.forward

    def counted(vae: Any, images: torch.Tensor, *options: Any) -> Any:
        counts["images"] += len(images)
        return posterior(vae, images, *options)

    def said(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        counts["captions"] += len(input_ids)
        return embed(self, input_ids, **options)

    monkeypatch.setattr(encode, "posterior", counted)
    monkeypatch.setattr(CLIPTextModel, "forward", said)
    return counts


def test_a_full_cache_costs_nothing_and_a_new_picture_itself(
    made: tuple[Path, str, Path], encoded: Counter[str]
) -> None:
    """Files may be renamed and added; training is refused until the command has seen them."""
    pipeline, spec, cache = made
    fields = settings(pipeline, spec, cache)
    assert fill("sd-distill", fields).exit_code == 0
    assert not encoded

    write_pictures(cache.parent / "pictures", COUNT + 1)
    with pytest.raises(ValueError, match=r"does not hold all of these data, .* or they have changed.*command cache"):
        small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}").build(cache.parent)
    assert fill("sd-distill", fields).exit_code == 0
    assert encoded == {"images": 2, "captions": 1}  # as it is, and mirrored
    assert small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}").build(cache.parent)


def test_a_stopped_command_continues(
    pipelines: Callable[[str], Path], tmp_path: Path, encoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends it with what is encoded on disk; no image is encoded twice, and training waits for the rest."""
    spec, cache = write_pictures(tmp_path / "pictures", 4 * COUNT), tmp_path / "cache"
    fields = settings(pipelines("sd1"), spec, cache)
    counted = encode.posterior

    def stopping(*given: Any) -> Any:
        if encoded["images"] >= 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return counted(*given)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "posterior", stopping)
        stopped = fill("sd-distill", fields)
    before = encoded["images"]
    assert stopped.exit_code == 130
    assert "the same command continues" in stopped.output
    assert 16 < before < 8 * COUNT
    with pytest.raises(ValueError, match="does not hold all of these data"):
        small_recipe("sd-distill", pipelines("sd1"), spec, f"data.cache={cache}").build(tmp_path)

    assert fill("sd-distill", fields).exit_code == 0
    assert encoded == {"images": 8 * COUNT, "captions": 4 * COUNT + 1}


def test_processes_share_the_work(pipelines: Callable[[str], Path], tmp_path: Path, encoded: Counter[str]) -> None:
    """Each encodes its part, into files of its own; together they are the cache of one."""
    spec, folder = write_pictures(tmp_path / "pictures", COUNT), tmp_path / "cache"
    recipe = small_recipe("sd-distill", pipelines("sd1"), spec, f"data.cache={folder}")
    text, vae = load_text(str(pipelines("sd1"))), load_vae(str(pipelines("sd1")))
    folder, views, data = recipe.data.open_to_cache(0, 16)
    writers = [Writer(folder, identity(text, vae), rank=rank) for rank in (0, 1)]
    fillings = [
        encode.fill(writer, data, views, text, vae, rank=rank, workers=2) for rank, writer in enumerate(writers)
    ]

    ends = [list(filling)[-1] for filling in fillings]

    assert [end.records for end in ends] == [COUNT // 2] * 2
    assert encoded["images"] == 2 * COUNT
    writers[0].finish(data.identity(), views)
    assert fill("sd-distill", settings(pipelines("sd1"), spec, folder)).exit_code == 0
    assert encoded["images"] == 2 * COUNT
    _, batches = recipe.build(tmp_path)
    assert len(list(islice(batches.batches(batch_size=2, start=0, rank=0, workers=1), COUNT))) == COUNT


def test_equal_pictures_and_captions_are_encoded_once(
    pipelines: Callable[[str], Path], tmp_path: Path, encoded: Counter[str]
) -> None:
    """They are found by their content."""
    spec = write_pictures(tmp_path / "pictures", 4)
    for index in range(4):
        (tmp_path / "pictures" / f"{index}.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes())
    lines = [f"{index}.png,the same" for index in range(4)]
    (tmp_path / "pictures" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))

    assert fill("sd-distill", settings(pipelines("sd1"), spec, tmp_path / "cache")).exit_code == 0
    assert encoded == {"images": 2, "captions": 2}


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (["data.crop=random"], "does not hold all of these data, in these sizes and crops"),
        (["data.resolution=32"], "does not hold all of these data"),
        (["vae"], r"was made with another model: vae \w+ \(now \w+\); give that one, or choose another data.cache"),
        (["text"], r"text \w+ \(now \w+\)"),
        (["data.buckets=True"], "does not hold all of these data"),
        (["data.cached_crops=2"], "cached_crops is 2, but the middle of an image is one; give crop=random, or 1"),
        (["data.cache=/nowhere"], "/nowhere is no cache.*make it by the command cache"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(
    other: list[str], complaint: str, made: tuple[Path, str, Path], tmp_path: Path
) -> None:
    """Naming what differs, before a step is taken."""
    pipeline, spec, cache = made
    if other in (["vae"], ["text"]):
        spoilt = write_tiny_pipeline(tmp_path / "other")
        network: Any = load_vae(str(spoilt)) if other == ["vae"] else load_text(str(spoilt)).networks[0]
        with torch.no_grad():
            next(network.parameters()).add_(0.001)
        network.save_pretrained(spoilt / {"vae": "vae", "text": "text_encoder"}[other[0]])
        other, pipeline = [f"teacher={spoilt}"], spoilt

    with pytest.raises(ValueError, match=complaint):
        small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}", *other).build(tmp_path)


def test_one_cache_serves_several_settings(made: tuple[Path, str, Path], tmp_path: Path, encoded: Counter[str]) -> None:
    """Without mirroring it has what is needed; other crops are added beside, and the first ones stay."""
    pipeline, spec, cache = made
    assert small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}", "data.flip=False").build(tmp_path)
    random = ["data.crop=random", "data.cached_crops=2", "data.flip=False"]

    assert fill("sd-distill", settings(pipeline, spec, cache, *random)).exit_code == 0
    assert encoded == {"images": 2 * COUNT}
    for crops in ([], random, ["data.crop=random", "data.flip=False"]):
        assert small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}", *crops).build(tmp_path)
    with pytest.raises(ValueError, match="does not hold all of these data"):
        small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}", "data.crop=random").build(tmp_path)


def test_a_changed_picture_is_not_mistaken_for_the_old_one(made: tuple[Path, str, Path], tmp_path: Path) -> None:
    """Of the same length and name: it is missed when its turn comes."""
    pipeline, spec, cache = made
    path = tmp_path / "pictures" / "0.png"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    _, data = small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}").build(tmp_path)

    with pytest.raises(ValueError, match="lacks an image; run the command cache again"):
        list(islice(data.batches(batch_size=2, start=0, rank=0, workers=1), COUNT))


def test_damage_is_named(made: tuple[Path, str, Path], tmp_path: Path) -> None:
    """A file that is cut short says what to do; removed, the command makes it again."""
    pipeline, spec, cache = made
    (shard,) = cache.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-000-00000.safetensors is damaged.*remove it, and run"):
        small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}").build(tmp_path)

    shard.unlink()
    assert fill("sd-distill", settings(pipeline, spec, cache)).exit_code == 0
    assert small_recipe("sd-distill", pipeline, spec, f"data.cache={cache}").build(tmp_path)


def test_what_has_no_cache_says_so(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """Recipes that learn from pixels, and scenes that are drawn anew; and folders of something else."""
    spec = write_pictures(tmp_path, 2)
    fields = settings(pipelines("sd1"), spec, tmp_path)
    scenes = settings(pipelines("sd1"), "scenes", tmp_path / "cache")

    assert "sd-tiny-vae learns from pixels" in fill("sd-tiny-vae", fields).output
    assert "drawn anew each time; leave data.cache out" in fill("sd-distill", scenes).output
    assert "has files, but no cache.json" in fill("sd-distill", fields).output
    assert "data.cache is not set" in fill("sd-distill", [*fields, "data.cache=None"]).output
    recipe = small_recipe("sd-tiny-vae", pipelines("sd1"), spec, f"data.cache={tmp_path}")
    with pytest.raises(ValueError, match=r"data.cache is .*, but this recipe learns from pixels; leave it out"):
        recipe.build(tmp_path)


def test_what_half_precision_cannot_hold_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than stored as infinity."""

    def huge(*_: Any) -> Iterator[Any]:
        return (torch.full((10, 4, 8, 8), 1e6) for _ in range(2))

    monkeypatch.setattr(encode, "posterior", lambda *given: tuple(huge(*given)))
    fields = settings(pipelines("sd1"), write_pictures(tmp_path / "pictures", 10, ((64, 64),)), tmp_path / "cache")
    monkeypatch.setattr(encode, "IMAGES_AT_ONCE", 10)
    with np.errstate(over="ignore"):
        assert "beyond float16, or no number; give --dtype float32" in fill("sd-distill", fields).output
