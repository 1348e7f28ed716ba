"""Finding the files of a model: names, variants, pickles, the hub."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from cloud_server.models.devices import place
from cloud_server.models.load import ModelError, load_model
from cloud_server.models.sources import UNET_STEM, Source, parse_source, weights_of

CPU = place("cpu", "fp32")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def rename(folder: Path, variant: str) -> None:
    """Makes the weights of U-Net and text encoder those of a variant."""
    for path in (folder / "unet" / WEIGHTS, folder / "text_encoder" / "model.safetensors"):
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def test_names(tmp_path: Path) -> None:
    """`id=where?variant=name` says it all; without an id the folder, file or hub id is the name."""
    (tmp_path / "model").mkdir()
    (tmp_path / "one.safetensors").touch()
    assert parse_source("mine=/models/x") == Source("mine", "/models/x")
    assert parse_source("mine=owner/name?variant=fp16") == Source("mine", "owner/name", "fp16")
    assert parse_source("owner/name?variant=fp16", variant="other") == Source("owner/name", "owner/name", "fp16")
    assert parse_source(f"{tmp_path}/model", variant="fp16").id == "model"
    assert parse_source(f"{tmp_path}/one.safetensors").id == "one"


def test_the_only_variant_is_taken(folder: Path) -> None:
    """Whether asked for, by option or by name, or not; the numbers are its own."""
    before = load_model(str(folder), CPU).info
    rename(folder, "fp16")
    for source, variant in ((str(folder), None), (str(folder), "fp16"), (f"copy={folder}?variant=fp16", None)):
        assert load_model(source, CPU, variant=variant).info == before


def test_variants_to_choose_from(folder: Path) -> None:
    """The plain weights win unless a variant is asked for; two variants alone are a question."""
    unet = folder / "unet"
    shutil.copy(unet / WEIGHTS, unet / "diffusion_pytorch_model.fp16.safetensors")
    assert weights_of(unet, UNET_STEM).files == (unet / WEIGHTS,)
    assert weights_of(unet, UNET_STEM, "fp16").variant == "fp16"
    assert weights_of(unet, UNET_STEM, "ema").variant is None
    (unet / WEIGHTS).rename(unet / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(ModelError, match=r"fp16, non_ema; choose one with --variant"):
        weights_of(unet, UNET_STEM)


def test_a_variant_in_several_files(folder: Path) -> None:
    """Its index has the variant in its name."""
    (folder / "unet" / WEIGHTS).unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text('{"weight_map": {"a": "b.safetensors", "c": "a.safetensors", "d": "b.safetensors"}}')
    found = weights_of(folder / "unet", UNET_STEM)
    assert ([path.name for path in found.files], found.variant) == (["a.safetensors", "b.safetensors"], "fp16")


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_pickles_are_not_loaded(folder: Path, part: str) -> None:
    """Weights come from safetensors only; the message says why, and what to do."""
    (folder / f"{part}.safetensors").rename(folder / f"{part}.bin")
    with pytest.raises(ModelError, match=r"\.bin is a pickle, .* take the \.safetensors"):
        load_model(str(folder), CPU)


def test_a_pickle_in_one_file_is_not_loaded(tmp_path: Path) -> None:
    """Before it is looked for."""
    with pytest.raises(ModelError, match=r"model\.ckpt is a pickle"):
        load_model(str(tmp_path / "model.ckpt"), CPU)


def test_missing_weights_are_named(folder: Path) -> None:
    """A folder without weights is a clear error."""
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"unet has no diffusion_pytorch_model\.safetensors"):
        load_model(str(folder), CPU)


@pytest.mark.parametrize("layout", ["beside others", "alone"])
def test_a_bare_unet_takes_the_rest_from_elsewhere(folder: Path, tmp_path: Path, layout: str) -> None:
    """As the published pruned and consistency U-Nets are laid out; without the rest it is said what to do."""
    bare = tmp_path / "bare"
    shutil.copytree(folder / "unet", bare / "unet" if layout == "beside others" else bare)
    with pytest.raises(ModelError, match="--config bare=FOLDER_OR_HUB_ID"):
        load_model(str(bare), CPU)
    extras = folder / "hybridsd.json"
    extras.write_text(json.dumps({**json.loads(extras.read_text()), "default_scheduler": "heun"}))
    for config in (str(folder), f"bare={folder}"):
        info = load_model(str(bare), CPU, configs=["other=nowhere", config]).info
        other = load_model(str(folder), CPU).info
        assert (info.id, info.num_parameters, info.latent_space) == ("bare", other.num_parameters, other.latent_space)
        assert (info.schedulers[0], other.schedulers[0]) == ("ddim", "heun")  # defaults are the other model's own


class Hub:
    """A hub with one model, which gives what is asked for."""

    def __init__(self, content: Path, cache: Path) -> None:
        self.content, self.cache = content, cache
        self.asked: list[list[str]] = []

    def snapshot_download(self, _hub_id: str, *, allow_patterns: list[str]) -> str:
        self.asked.append(allow_patterns)
        for path in self.content.rglob("*"):
            name = path.relative_to(self.content)
            if path.is_file() and any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that has the tiny model."""
    made = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_a_hub_id_fetches_what_is_needed(hub: Hub) -> None:
    """Only the parts that are served; the VAE's weights only where they name the latent space."""
    info = load_model("owner/name", CPU).info
    assert (info.id, len(hub.asked)) == ("owner/name", 1)
    assert not (hub.cache / "vae" / WEIGHTS).exists()

    for folder in (hub.content, hub.cache):
        (folder / "hybridsd.json").unlink()
    assert load_model("owner/name", CPU).info.latent_space.startswith("vae-")
    (hub.content / "vae" / WEIGHTS).unlink()
    (hub.cache / "vae" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="--latent-space"):
        load_model("owner/name", CPU)


def test_a_hub_model_in_half_precision_only(hub: Hub) -> None:
    """Its weights are found where there are no others, or asked for."""
    rename(hub.content, "fp16")
    assert load_model("owner/name", CPU).info.num_parameters > 1000
    assert not (hub.cache / "unet" / WEIGHTS).exists()
    shutil.rmtree(hub.cache)
    assert load_model("owner/name", CPU, variant="fp16").info.id == "owner/name"
    assert len(hub.asked) == 3


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub says goes to the user, with what to do."""

    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"offline.*give its folder"):
        load_model("owner/name", CPU)
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        load_model("no/such/model", CPU)
