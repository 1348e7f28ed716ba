"""The pruned format: the reference's checkpoints compute the reference's numbers, and what is saved is loaded again."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridsd import pruned_unet
from training.core.diffusion import build_unet
from training.models import shapes
from training.models.pruned_unet import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, layers, load_unet, save_unet
from training.pruning.depth import drop
from training.pruning.widths import cut

FORMAT = Path(__file__).parents[3] / "data" / "hybrid-sd-format"
TOLERANCE = 1e-5  # what the fixture's README promises


@torch.no_grad()
def answer(unet: UNet2DConditionModel, case: int, io: dict[str, Tensor]) -> Tensor:
    """Runs the U-Net on one of the inputs beside a checkpoint."""
    output: Tensor = unet(
        io[f"sample_{case}"],
        io[f"timestep_{case}"],
        io[f"encoder_hidden_states_{case}"],
        timestep_cond=io.get(f"timestep_cond_{case}"),
    ).sample
    return output


@torch.no_grad()
def predict(unet: UNet2DConditionModel) -> Tensor:
    """Runs a U-Net of 16 text features on noise."""
    noise = torch.Generator().manual_seed(0)
    output: Tensor = unet(
        torch.randn(2, 4, 16, 24, generator=noise), torch.tensor([3, 700]), torch.randn(2, 5, 16, generator=noise)
    ).sample
    return output


@pytest.fixture(scope="module")
def demo() -> UNet2DConditionModel:
    """An uncut U-Net of the demo's shape: two layers a block, a middle block, attention at one level."""
    torch.manual_seed(0)
    return build_unet((64, 96, 128), layers=2, cross_attention_dim=16, mid=True).eval()


@pytest.fixture
def pruned(demo: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same with some layers cut."""
    names = ("down_blocks.0.resnets.1", "mid_block.resnets.0", "up_blocks.1.attentions.2.transformer_blocks.0.attn2")
    return cut(demo, dict.fromkeys(names, 0.5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a published checkpoint that a test may spoil."""
    return Path(shutil.copytree(FORMAT / "unet", tmp_path / "copy"))


@pytest.mark.parametrize("name", ["unet", "unet_lcm"])
def test_a_checkpoint_of_the_reference_computes_what_the_reference_did(name: str) -> None:
    """Inputs of three sizes, with a guidance embedding where there is one, give the recorded outputs."""
    unet, io = load_unet(FORMAT / name), load_file(FORMAT / name / "io.safetensors")
    for case in range(3):
        torch.testing.assert_close(answer(unet, case, io), io[f"output_{case}"], atol=TOLERANCE, rtol=0)
    assert not unet.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in unet.parameters())


def test_a_configuration_of_old_diffusers_is_read_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged of keys that stock diffusers does not know, and none of them is left."""
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            unet = load_unet(FORMAT / "unet_lcm")
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.records
    assert not set(pruned_unet.EXTRA_KEYS) & set(unet.config)


def test_weights_may_lie_at_the_root_or_under_unet(folder: Path, tmp_path: Path) -> None:
    """A pipeline's folder, a U-Net's own, and a named folder give the same U-Net; so does a hub id."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "unet")
    shutil.copytree(folder, pipeline / "unet_ema")
    io = load_file(folder / "io.safetensors")
    at_root = answer(load_unet(str(folder)), 0, io)
    assert torch.equal(at_root, answer(load_unet(pipeline), 0, io))
    assert torch.equal(at_root, answer(load_unet(pipeline, subfolder="unet_ema"), 0, io))


def test_a_hub_id_fetches_the_unet_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both places, safetensors and their index; no pickles, no variants, no other networks."""
    asked: list[str] = []

    def snapshot_download(_hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(layers(load_unet("owner/name"))) == 27
    assert {CONFIG_NAME, WEIGHTS_NAME, f"unet/{CONFIG_NAME}", f"unet/{WEIGHTS_NAME}"} <= set(asked)
    assert len(asked) == 8
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        load_unet("./nowhere/unet")
    with pytest.raises(ValueError, match=r"there is no U-Net in out.nowhere or out.nowhere.unet"):
        load_unet(Path("out/nowhere"))  # a path is never taken for a hub id


def test_what_is_saved_is_loaded_again(pruned: UNet2DConditionModel, tmp_path: Path) -> None:
    """Same widths, weights and answers; the lists are beside it, long where layers of a block differ."""
    pruned.register_to_config(_name_or_path="/home/somebody/runs")
    save_unet(pruned, tmp_path / "new" / "unet")
    again = load_unet(tmp_path / "new")
    assert layers(again) == layers(pruned)
    assert torch.equal(predict(again), predict(pruned))
    config = json.loads((tmp_path / "new" / "unet" / CONFIG_NAME).read_text(encoding="utf-8"))
    assert config["block_mid_channels"] == [64, 32, 96, 96, 128, 128, 64, 128, *[128] * 3, *[96] * 3, *[64] * 3]
    assert config["block_selfattn_heads"] == [3, 4, 3, 3, 3]
    assert "_name_or_path" not in config
    assert config["block_crossattn_heads"] == [3, 4, 3, 3, 2]


def test_what_is_not_pruned_stays_stock(demo: UNet2DConditionModel, tmp_path: Path) -> None:
    """Stock diffusers loads it completely, there are no lists, and we load what stock diffusers saved."""
    save_unet(demo, tmp_path / "ours")
    demo.save_pretrained(tmp_path / "stock", max_shard_size="1MB")
    stock, found = UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values())
    config = json.loads((tmp_path / "ours" / CONFIG_NAME).read_text(encoding="utf-8"))
    assert not set(pruned_unet.EXTRA_KEYS) & set(config)
    assert (tmp_path / "stock" / INDEX_NAME).is_file()  # in several files
    assert torch.equal(predict(stock), predict(demo))
    assert torch.equal(predict(load_unet(tmp_path / "stock")), predict(demo))


def test_dtypes_are_those_asked_for(pruned: UNet2DConditionModel, tmp_path: Path) -> None:
    """Saved in half precision it is half as large, and loads as float32 or as it is wanted."""
    save_unet(pruned, tmp_path, dtype=torch.float16)
    parameters = sum(parameter.numel() for parameter in pruned.parameters())
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 2.1 * parameters + 100_000
    assert pruned.dtype == torch.float32
    assert load_unet(tmp_path).dtype == torch.float32
    half = load_unet(tmp_path, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half.conv_in.weight, pruned.conv_in.weight.half())


def test_a_loaded_unet_does_not_depend_on_its_file(folder: Path) -> None:
    """Whoever writes to the file later does not change the U-Net."""
    unet = load_unet(folder)
    before = unet.conv_in.weight.clone()
    with (folder / WEIGHTS_NAME).open("r+b") as file:
        file.seek(-1_000_000, 2)
        file.write(b"\xff" * 1_000_000)
    assert torch.equal(unet.conv_in.weight, before)
    assert all(bool(parameter.isfinite().all()) for parameter in unet.parameters())


def test_a_full_disk_leaves_the_old_unet(
    demo: UNet2DConditionModel, pruned: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that cannot be written leave what was there."""

    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    save_unet(demo, tmp_path)
    monkeypatch.setattr("training.models.pruned_unet.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_unet(pruned, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert torch.equal(predict(load_unet(tmp_path)), predict(demo))


def test_the_224m_unet_has_its_published_size() -> None:
    """SD 1.4, BK-SDM-Tiny, the synthetic cut: exactly 224,490,116 parameters, and the lists it was made by."""
    lists = {
        "block_mid_channels": [96, 160, 320, 320, 640, 320, 160, 256, 96],
        "block_selfattn_heads": [8, 8, 8, 8, 6, 8, 8, 8, 8],
        "block_crossattn_heads": [8, 8, 8, 8, 8, 6, 6, 8, 6],
    }
    tiny = drop(shapes.sd14(), levels=3)
    wanted = {
        kind: iter(sizes) for kind, sizes in zip(("resnet", "selfattn", "crossattn"), lists.values(), strict=True)
    }
    ratios = {}
    for layer in layers(tiny):
        size = next(wanted[layer.kind])
        ratios[layer.name] = {96: 0.25, 256: 0.75}.get(size, size / layer.full)
    small = cut(tiny, {name: ratio for name, ratio in ratios.items() if ratio < 1})
    assert sum(parameter.numel() for parameter in small.parameters()) == 224_490_116
    assert pruned_unet.config_lists(layers(small)) == lists


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def change(folder: Path, name: str, value: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, folder / WEIGHTS_NAME)


def test_a_configuration_that_contradicts_the_weights_is_refused(folder: Path) -> None:
    """The message names the layer, both numbers and what to do."""
    edit(folder, block_mid_channels=[16, 32, 48, 32, 32, 16, 32, 32, 16])
    with pytest.raises(
        ValueError, match=r"block_mid_channels\[4\] .* 32, but .*up_blocks\.0\.resnets\.1 have 64; corr"
    ):
        load_unet(folder)
    edit(folder, block_mid_channels=None)
    assert layers(load_unet(folder))[0].size == 16


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("conv_in.bias", None, r"1 tensors are missing \(such as conv_in\.bias\), 0 are not known"),
        ("mid_block.resnets.0.norm1.bias", torch.zeros(3), r"1 are not known \(such as mid_block"),
        ("conv_in.bias", torch.zeros(3), r"conv_in\.bias is \(3,\), but the configuration wants \(32,\)"),
        ("down_blocks.0.resnets.0.norm2.bias", torch.zeros(8), r"norm2\.bias has 8 inner channels"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, name: str, value: Tensor | None, says: str) -> None:
    """Missing, left over or of another shape: the message names the tensor, and the folder."""
    change(folder, name, value)
    with pytest.raises(ValueError, match=says):
        load_unet(folder)


def test_groups_that_do_not_divide_a_width_are_refused(folder: Path) -> None:
    """A width of 48 cannot be normalized in 32 groups."""
    edit(folder, norm_num_groups=32)
    with pytest.raises(ValueError, match=r"16 inner channels, which norm_num_groups = 32 does not divide"):
        load_unet(folder)


def test_what_is_no_unet_is_refused(folder: Path) -> None:
    """No weights, another class, half a file, no JSON: the message says what to give."""
    edit(folder, _class_name="UNet3DConditionModel")
    with pytest.raises(ValueError, match="holds a UNet3DConditionModel; give the folder of a UNet2DConditionModel"):
        load_unet(folder)
    edit(folder, _class_name="UNet2DConditionModel")
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_unet(folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_unet(folder)
    (folder / "unet").mkdir()
    (folder / CONFIG_NAME).rename(folder / "unet" / CONFIG_NAME)
    (folder / "unet" / CONFIG_NAME).write_text("{", encoding="utf-8")
    weights.with_suffix(".bin").rename(folder / "unet" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="is not JSON"):
        load_unet(folder)
