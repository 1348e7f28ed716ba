"""The graphs: ONNX computes what torch computes, for every kind of U-Net, decoder and text encoder."""

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from training.export.graphs import Graph, text_encoder_graph, unet_graph
from training.export.onnx_export import (
    ParityError,
    data_path,
    export_graph,
    name_products,
    prepared,
    save_onnx,
    store_as_half,
    strip,
)

EXACT = 2e-5
"""Two implementations of the same float32 arithmetic, outputs of order 1: a few hundred roundings."""
HALF = 5e-3
"""The same in float16."""


def tiny_unet(**options: object) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            **{
                "layers_per_block": 1,
                "block_out_channels": (16,),
                "down_block_types": ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",),
                "mid_block_type": "UNetMidBlock2DCrossAttn",
                "cross_attention_dim": 8,
                "attention_head_dim": 2,
                "norm_num_groups": 8,
                **options,
            }
        ).eval()


def arrays(feed: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {name: value.numpy() for name, value in feed.items()}


@pytest.mark.slow
def test_fused_guidance_is_the_two_row_formula(tmp_path: Path) -> None:
    """One call of the fused graph of an SDXL U-Net gives u + g (c - u), with a guidance of its own for each row."""
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + 6
    )
    graph = unet_graph(unet, context_length=5, fused_guidance=True)
    parity = export_graph(graph, tmp_path / "unet.onnx", precision="fp32")
    session = onnxruntime.InferenceSession(str(tmp_path / "unet.onnx"))

    assert parity.relative_error < EXACT
    assert [value.name for value in session.get_inputs()] == [
        "sample", "timestep", "prompt_embeds", "negative_prompt_embeds", "guidance_scale", "text_embeds",
        "negative_text_embeds", "time_ids",
    ]  # fmt: skip
    feed = dict(graph.feeds[-1])
    (guided,) = session.run(None, arrays(feed))
    with torch.inference_mode():
        unconditional, conditional = (
            unet(
                feed["sample"],
                feed["timestep"],
                feed[f"{prefix}prompt_embeds"],
                added_cond_kwargs={"text_embeds": feed[f"{prefix}text_embeds"], "time_ids": feed["time_ids"]},
            ).sample
            for prefix in ("negative_", "")
        )
    scale = feed["guidance_scale"][:, None, None, None]
    assert torch.allclose(torch.from_numpy(guided), unconditional + scale * (conditional - unconditional), atol=1e-4)


@pytest.mark.slow
def test_lcm_graph_embeds_the_guidance(tmp_path: Path) -> None:
    """A U-Net of time_cond_proj_dim gets the sines and cosines of 1000 (g - 1); float16 arithmetic is close."""
    unet = tiny_unet(time_cond_proj_dim=16)
    graph = unet_graph(unet, context_length=5)
    parity = export_graph(graph, tmp_path / "unet.onnx", precision="fp16")
    session = onnxruntime.InferenceSession(str(tmp_path / "unet.onnx"))
    types = {value.type for value in (*session.get_inputs(), *session.get_outputs())}
    weights = onnx.load(str(tmp_path / "unet.onnx")).graph.initializer

    assert EXACT < parity.relative_error < HALF
    assert types == {"tensor(float)"}
    assert not any(tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) > 256 for tensor in weights)
    feed = dict(graph.feeds[0])
    frequencies = [math.exp(-math.log(10000) * index / 7) for index in range(8)]
    angles = [[1000 * (float(scale) - 1) * value for value in frequencies] for scale in feed["guidance_scale"]]
    condition = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles])
    (actual,) = session.run(None, arrays(feed))
    with torch.inference_mode():
        expected, other = (
            unet(feed["sample"], feed["timestep"], feed["encoder_hidden_states"], timestep_cond=given).sample.numpy()
            for given in (condition, condition.flip(1))
        )
    assert np.abs(actual - expected).max() < HALF * 5 < np.abs(actual - other).max()
    with pytest.raises(ValueError, match="leave fused_guidance out"):
        unet_graph(unet, context_length=5, fused_guidance=True)


def test_text_encoder_gives_an_inner_layer_and_the_pooled_text(tmp_path: Path) -> None:
    """SDXL's text encoders are read one layer before the last, and the second one's pooled output is used."""
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=6, projection_dim=4, bos_token_id=30, eos_token_id=31,
    )  # fmt: skip
    encoder = CLIPTextModelWithProjection(config).eval()
    graph = text_encoder_graph(encoder, hidden_layer=-2, pooled=True)
    parity = export_graph(graph, tmp_path / "text.onnx", precision="fp32")
    feed = dict(graph.feeds[-1])
    hidden, pooled = onnxruntime.InferenceSession(str(tmp_path / "text.onnx")).run(None, arrays(feed))
    with torch.inference_mode():
        expected = encoder(**feed, output_hidden_states=True)

    assert parity.relative_error < EXACT
    assert np.allclose(hidden, expected.hidden_states[-2].numpy(), atol=EXACT)
    assert np.allclose(pooled, expected.text_embeds.numpy(), atol=EXACT)


def small_model(*weights: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    """A model that adds its weights to its input."""
    names = ["x", *(f"y{index}" for index in range(1, len(weights))), "z"]
    nodes = [helper.make_node("Add", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(weights))]
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(weights[0].shape))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, list(weights[0].shape))],
        [numpy_helper.from_array(values, f"w{index}") for index, values in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_file_does_not_show_where_it_was_made(tmp_path: Path) -> None:
    """The exporter's stack traces, with paths of this machine, are left out."""
    export_graph(unet_graph(tiny_unet(), context_length=5), tmp_path / "unet.onnx")

    assert b"site-packages" not in (tmp_path / "unet.onnx").read_bytes()


def test_nothing_is_said_beside_the_network_at_any_depth(tmp_path: Path) -> None:
    """Metadata and texts of the model, its graphs, those within nodes, functions, values and tensors are cleared."""
    secret = "/home/someone/models"
    model = small_model(np.ones((2, 2), np.float32))
    inner = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["a"], ["b"])], "inner", [], [])
    branching = onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner)
    function = onnx.helper.make_function("own", "f", ["x"], ["y"], [branching], [onnx.helper.make_opsetid("", 18)])
    for part in (model, model.graph, function, *function.node, *model.graph.input, *model.graph.initializer):
        part.doc_string = secret
        part.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=secret)
    for attribute in function.node[0].attribute:
        attribute.doc_string = attribute.g.node[0].doc_string = secret
        attribute.g.metadata_props.add(key="at", value=secret)
    model.functions.append(function)
    assert secret.encode() in model.SerializeToString()

    assert secret.encode() not in strip(model).SerializeToString()
    assert len(model.functions[0].node[0].attribute) == 2
    assert model.graph.initializer[0].raw_data


def test_names_of_matrices_stay_apart() -> None:
    """Two products of one module, and one of none, are not named alike: the second keeps its number."""
    matrices = [onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), name) for name in ("val_1", "val_2", "val_3")]
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", f"val_{i}"], [f"x{i + 1}"]) for i in (1, 2, 3)]
    for node, scopes in zip(nodes, ("['', 'a.b', 'matmul']", "['', 'a.b', 'matmul']", "['', 'matmul']"), strict=True):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], matrices))
    name_products(model)

    assert [tensor.name for tensor in model.graph.initializer] == ["a.b.weight.T", "val_2", "val_3"]
    assert [node.input[1] for node in model.graph.node] == ["a.b.weight.T", "val_2", "val_3"]


def test_only_lossless_weights_are_halved() -> None:
    """A weight that float16 cannot hold stays in float32; the result computes the same."""
    exact = np.linspace(0, 1, 33, dtype=np.float32)[:32]
    inexact, too_large = np.full(32, 0.1, dtype=np.float32), np.full(32, 1e6, dtype=np.float32)
    halved = store_as_half(small_model(exact, inexact, too_large))
    types = {tensor.name: tensor.data_type for tensor in halved.graph.initializer}
    session = onnxruntime.InferenceSession(halved.SerializeToString())

    assert types == {"w0.half": TensorProto.FLOAT16, "w1": TensorProto.FLOAT, "w2": TensorProto.FLOAT}
    assert np.array_equal(session.run(None, {"x": np.zeros(32, np.float32)})[0], exact + inexact + too_large)


def test_too_many_weights_go_into_one_file_beside(tmp_path: Path) -> None:
    """Above the limit there is exactly one data file, which writing again does not let grow; below it, none."""
    path = tmp_path / "unet.onnx"
    weights = np.arange(512, dtype=np.float32)
    sizes = []
    for _ in range(2):
        save_onnx(small_model(weights, weights + 0.1), path, data_limit=3000)
        sizes.append(data_path(path).stat().st_size)
        result = onnxruntime.InferenceSession(str(path)).run(None, {"x": np.zeros(512, np.float32)})[0]
        assert np.array_equal(result, weights + (weights + 0.1))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["unet.onnx", "unet.onnx.data"]
    assert sizes[0] == sizes[1] > 0
    save_onnx(small_model(weights), path, data_limit=3000)
    assert [file.name for file in tmp_path.iterdir()] == ["unet.onnx"]


class _Scale(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return 2 * sample if torch.compiler.is_compiling() else 2.1 * sample


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """An error above the tolerance raises and names the role; a larger tolerance accepts it."""
    graph = Graph(
        role="unet", module=_Scale(), axes={"sample": {0: "batch"}}, outputs=("y",), feeds=({"sample": torch.ones(2)},)
    )
    with pytest.raises(ParityError, match=r"unet as fp32 has a relative error of 0\.048"):
        export_graph(graph, tmp_path / "x.onnx", precision="fp32")
    assert export_graph(graph, tmp_path / "x.onnx", precision="fp32", tolerance=math.inf).max_abs_error > 0.09


def test_exporting_leaves_the_network_as_it_was() -> None:
    """Rounding to half precision happens in a copy."""
    unet = tiny_unet()
    before = unet.conv_in.weight.clone()
    rounded = prepared(unet_graph(unet, context_length=5), "half-storage").module

    assert torch.equal(unet.conv_in.weight, before)
    assert not torch.equal(next(rounded.parameters()), before)
