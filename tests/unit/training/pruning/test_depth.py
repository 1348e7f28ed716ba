"""Depth pruning: which layers stay, that they are the teacher's, and which features they share with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from training.core.diffusion import build_unet
from training.cost.cost import unet_inputs
from training.distillation.distill import captured
from training.models import shapes
from training.pruning.depth import drop, feature_map, source_of, sources

pytestmark = pytest.mark.slow

DOWN = "CrossAttnDownBlock2D"
UP = "CrossAttnUpBlock2D"


def sd(widths: tuple[int, ...] = (32, 32, 64, 64), **config: Any) -> UNet2DConditionModel:
    """A narrow U-Net laid out like SD 1.x's, for latents of 16x16, with random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": widths,
            "down_block_types": (*(DOWN,) * (len(widths) - 1), "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *(UP,) * (len(widths) - 1)),
            "layers_per_block": 2,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
            **config,
        }
    ).eval()


def sdxl(**config: Any) -> UNet2DConditionModel:
    """A narrow U-Net laid out like SDXL's."""
    return sd(
        (16, 32, 64),
        down_block_types=("DownBlock2D", DOWN, DOWN),
        up_block_types=(UP, UP, "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        **config,
    )


@torch.no_grad()
def predict(unet: UNet2DConditionModel) -> Tensor:
    """Runs a U-Net on fixed noise."""
    output: Tensor = unet(**unet_inputs(unet.config, batch=2, height=16, width=16, tokens=5)).sample
    return output


@torch.no_grad()
def pass_through_dropped(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
    """Makes every layer of the teacher that the student lacks give what it is given."""
    prefixes = sources(student, teacher)
    left = {source_of(name, prefixes) for name in student.state_dict()}
    for path, part in teacher.named_modules():
        if any(name.startswith(f"{path}.") for name in left):
            continue
        last: list[nn.Module] = []
        if isinstance(part, ResnetBlock2D):
            last = [part.conv2]
            if part.conv_shortcut is not None:  # it reads the hidden channels, then those of the skip connection
                last.append(part.conv_shortcut)
        elif isinstance(part, Transformer2DModel):
            last = [part.proj_out]
        elif isinstance(part, BasicTransformerBlock):
            last = [part.attn1.to_out[0], part.attn2.to_out[0], part.ff.net[2]]
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if isinstance(part, ResnetBlock2D) and part.conv_shortcut is not None:
            part.conv_shortcut.weight[:, : part.out_channels, 0, 0] = torch.eye(part.out_channels)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"mid": True}, 579_384_964),  # BK-SDM-Base, published as 0.58B
        ({}, 482_346_884),  # BK-SDM-Small
        ({"levels": 3}, 323_384_964),  # BK-SDM-Tiny
    ],
)
def test_sd14_becomes_the_bk_sdm_family(options: dict[str, Any], parameters: int) -> None:
    """The prunings of Stable Diffusion 1.4's U-Net have the published sizes."""
    student = drop(shapes.sd14(), **options)
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"mid": True, "transformer_layers": (1, 2, 6)}, 1_161_184_324),  # KOALA-1B
        ({"transformer_layers": (1, 2, 5)}, 782_822_724),  # KOALA-700M
    ],
)
def test_sdxl_becomes_the_koala_family(options: dict[str, Any], parameters: int) -> None:
    """The prunings of SDXL's U-Net have the published sizes."""
    teacher = shapes.sdxl()
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 2_567_463_684
    student = drop(teacher, **options)
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters


@pytest.mark.parametrize("mid", [False, True])
def test_a_student_computes_what_its_teacher_does_without_the_dropped_layers(mid: bool) -> None:
    """Where the dropped layers hand on what they get, nothing changes: the right ones stayed, at the right skips."""
    teacher = sd()
    student = drop(teacher, mid=mid)
    assert not torch.allclose(predict(student), predict(teacher), atol=1e-3)
    pass_through_dropped(teacher, student)
    torch.testing.assert_close(predict(student), predict(teacher), atol=1e-5, rtol=1e-5)


def test_the_first_transformer_blocks_of_sdxl_stay() -> None:
    """Where the last ones hand on what they get, nothing changes."""
    teacher = sdxl()
    student = drop(teacher, layers_per_block=2, mid=True, transformer_layers=(1, 1, 2))
    assert not torch.allclose(predict(student), predict(teacher), atol=1e-3)
    pass_through_dropped(teacher, student)
    torch.testing.assert_close(predict(student), predict(teacher), atol=1e-5, rtol=1e-5)
    assert len(student.up_blocks[0].attentions[2].transformer_blocks) == 2


def test_weights_are_copies_of_the_teachers() -> None:
    """Every parameter equals the one it comes from, and is not the same memory."""
    teacher = sd()
    student = drop(teacher, levels=3)
    prefixes = sources(student, teacher)
    given = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, given[source_of(name, prefixes)]), name
        assert value.data_ptr() != given[source_of(name, prefixes)].data_ptr(), name
    assert source_of("up_blocks.0.resnets.1.conv1.weight", prefixes) == "up_blocks.1.resnets.2.conv1.weight"
    assert source_of("down_blocks.2.attentions.0.norm.bias", prefixes) == "down_blocks.2.attentions.0.norm.bias"
    assert student.down_blocks[2].downsamplers is None
    assert predict(student).shape == (2, 4, 16, 16)


def test_a_student_is_as_its_teacher() -> None:
    """It is in the same mode and dtype, and trains."""
    student = drop(sd().to(torch.bfloat16).train())
    assert student.training
    assert student.dtype == torch.bfloat16
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in student.parameters())


@pytest.mark.parametrize("options", [{"mid": True}, {"levels": 2}, {"transformer_layers": (1, 2, 2)}])
def test_stock_diffusers_loads_a_student(options: dict[str, Any], tmp_path: Path) -> None:
    """What is saved is an ordinary U-Net with the same weights and the same answers."""
    teacher = sdxl() if "transformer_layers" in options else sd((32, 32, 32))
    student = drop(teacher, **options)
    student.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(predict(student), predict(loaded.eval()))


def test_students_of_students_and_of_consistency_models() -> None:
    """A U-Net can be pruned step by step, and keeps its guidance embedding."""
    teacher = sd(time_cond_proj_dim=8)
    by_steps, at_once = drop(drop(teacher, layers_per_block=1, mid=True), levels=3), drop(teacher, levels=3)
    assert by_steps.config.time_cond_proj_dim == 8
    assert torch.equal(predict(by_steps), predict(at_once))


BK_TINY = (
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1", "down_blocks.1"),
    ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
    ("up_blocks.1", "up_blocks.0"),
    ("up_blocks.2", "up_blocks.1"),
    ("up_blocks.3", "up_blocks.2"),
)


def test_features_of_bk_sdm_are_paired_as_published() -> None:
    """Tiny's innermost down block has no downsampler and pairs its attention; Base's and Small's pair one to one."""
    teacher = sd()
    assert feature_map(drop(teacher, levels=3), teacher) == BK_TINY
    one_to_one = tuple((path, path) for path in [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)])
    assert feature_map(drop(teacher, mid=True), teacher) == one_to_one
    assert feature_map(drop(teacher), teacher) == one_to_one


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mid", [False, True])
def test_features_of_the_demo_are_paired_one_to_one(layers: int, mid: bool) -> None:
    """Three levels, one or two layers, with a middle block or without: down and up blocks of one level."""
    teacher = build_unet((32, 64, 96), layers=layers, cross_attention_dim=16, mid=mid)
    student = drop(teacher, mid=mid)
    paths = [f"{side}_blocks.{index}" for side in ("down", "up") for index in range(3)]
    assert feature_map(student, teacher) == tuple((path, path) for path in paths)
    narrow = build_unet((32, 32, 96), layers=1, cross_attention_dim=16, mid=False)
    assert feature_map(narrow, teacher) == tuple((path, path) for path in paths if not path.endswith("blocks.1"))


@pytest.mark.parametrize("options", [{}, {"levels": 3}, {"levels": 2}])
def test_paired_features_have_equal_shapes(options: dict[str, Any]) -> None:
    """What the paired modules give when both U-Nets run can be compared."""
    teacher = sd((32, 32, 32, 32))
    student = drop(teacher, **options)
    pairs = feature_map(student, teacher)
    with (
        captured(teacher, [path for path, _ in pairs]) as wanted,
        captured(student, [path for _, path in pairs]) as given,
    ):
        predict(teacher)
        predict(student)
    assert [wanted[path].shape for path, _ in pairs] == [given[path].shape for _, path in pairs]
    assert len(pairs) == 2 * len(student.down_blocks)


def test_a_block_without_attention_pairs_its_last_resnets() -> None:
    """Where the innermost block that is left has no attention, features are those of the resnets."""
    teacher = sd((32, 32, 32, 32), down_block_types=(DOWN, DOWN, "DownBlock2D", "DownBlock2D"))
    pairs = feature_map(drop(teacher, levels=3), teacher)
    assert ("down_blocks.2.resnets.1", "down_blocks.2.resnets.0") in pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_per_block": 3}, "layers_per_block is 3, but a block of the U-Net has 2; choose 1 to 2"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"levels": 5}, "levels is 5, but the U-Net has 4; choose 1 to 4"),
        ({"levels": 0}, "levels is 0"),
        ({"levels": 3, "mid": True}, "drop both or neither"),
        ({"transformer_layers": 2}, r"transformer_layers is 2, but the 4 levels have \[1, 1, 1, 1\]"),
        ({"transformer_layers": (1, 1)}, r"transformer_layers is \(1, 1\), but the 4 levels have"),
        ({"levels": 2}, r"up_blocks.0.resnets.0.norm1.weight must be .* a level can only be dropped if the one above"),
    ],
)
def test_asking_for_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    """The message says what was asked, what there is, and what to choose."""
    with pytest.raises(ValueError, match=message):
        drop(sd(), **options)


def test_a_middle_block_that_is_not_there_cannot_stay() -> None:
    """Nor does a student have more than its teacher."""
    with pytest.raises(ValueError, match="no middle block"):
        drop(sd(mid_block_type=None), mid=True)
    with pytest.raises(ValueError, match="the student has 4 levels, but its teacher 3"):
        feature_map(sd(), drop(sd(), levels=3))
    with pytest.raises(ValueError, match=r"of the student has 2 layers, but down_blocks\.0 of the teacher 1"):
        sources(sd(), drop(sd()))
