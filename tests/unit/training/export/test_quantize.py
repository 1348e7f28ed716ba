"""8-bit U-Nets: ranges come from real trajectories, sensitive layers stay in float, and the error is measured."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from hybridsd import noise
from hybridsd.plan import Plan, from_json
from training.export.onnx_export import data_path, save_onnx
from training.export.quantize import measure_quantization, quantize_unet
from training.export.trajectories import Drawing, Feed, follow, guide, open_unet, record_trajectories

EDGE = Path(__file__).parents[4] / "deploy" / "demo" / "edge"
STEPS = 4
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Few steps of the demo family's solver."""
    return from_json(json.dumps(json.loads((EDGE / "plans.json").read_text())[f"dpmpp_2m/{STEPS}"]))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained demo U-Net of the edge, its weights as plain float32 again, in a file beside the graph."""
    model = onnx.load(str(EDGE / "unet.onnx"))
    halves = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in halves]:
        values = numpy_helper.to_array(halves[node.input[0]]).astype(np.float32)
        halves[node.input[0]].CopyFrom(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    path = tmp_path_factory.mktemp("exact") / "unet.onnx"
    save_onnx(model, path, data_limit=1_000_000)
    assert data_path(path).stat().st_size > 4 * 4_000_000
    return path


def drawings(*seeds: int) -> list[Drawing]:
    """Images of unlikely texts: what the network sees in between is real."""
    return [
        Drawing(
            seed=seed,
            shape=SHAPE,
            conditioning={
                "encoder_hidden_states": np.random.default_rng(seed).standard_normal((2, 32, 256), dtype=np.float32)
            },
            guidance_scale=4.0,
        )
        for seed in seeds
    ]


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterator[Feed]) -> None:
        self.feeds = feeds

    def get_next(self) -> Feed | None:
        feed = next(self.feeds, None)
        return None if feed is None else dict(feed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_unet_loses_less_than_when_all_of_it_is_quantized(exact: Path, plan: Plan, tmp_path: Path) -> None:
    """With the sensitive layers in float the error is well below that of 8 bits throughout, at a third of the size."""
    feeds = list(record_trajectories(plan, open_unet(exact), drawings(1, 2)))
    kept = quantize_unet(exact, tmp_path / "ours.onnx", feeds, data_limit=1_000_000)
    quantize_static(
        exact, tmp_path / "naive.onnx", _Feeds(iter(feeds)), op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    ours, naive = (
        measure_quantization(exact, tmp_path / f"{name}.onnx", plan, drawings(3)) for name in ("ours", "naive")
    )

    assert ours.calls == STEPS
    # A CPU without VNNI saturates sums of 8-bit products: 0.051 of 0.084 on AVX2, 0.017 on AVX-512 VNNI.
    assert 0 < ours.relative_error < 0.7 * naive.relative_error
    assert ours.relative_error < 0.06
    assert ours.guided_error < naive.guided_error
    assert ours.size_ratio < 0.35
    assert data_path(tmp_path / "ours.onnx").stat().st_size > 3_000_000
    assert {"unet.conv_in.weight", "unet.conv_out.weight"} < set(kept)
    types = {tensor.name: tensor.data_type for tensor in onnx.load(str(tmp_path / "ours.onnx")).graph.initializer}
    assert types["unet.conv_in.weight.half"] == TensorProto.FLOAT16


def test_a_trajectory_is_what_the_product_draws() -> None:
    """Feeds start with the product's noise, have both rows, and follow the guided output; the end is the plan's."""
    euler = from_json(json.dumps(json.loads((EDGE / "plans.json").read_text())[f"ddim/{STEPS}"]))
    seen = []

    def predict(feed: Feed) -> np.ndarray:  # type: ignore[type-arg]
        seen.append(feed)
        return np.stack([feed["sample"][0] * 0.1, feed["sample"][1] * 0.2])

    (drawing,) = drawings(5)
    fed = [feed for feed, _ in follow(euler, predict, drawing)]
    latents = [latents for _, latents in follow(euler, predict, drawing)]

    assert [float(feed["timestep"][1]) for feed in fed] == [row.timestep for row in euler.rows]
    assert np.array_equal(fed[0]["sample"], np.stack([noise.initial_latents(5, 0, SHAPE)] * 2))
    assert np.array_equal(fed[0]["encoder_hidden_states"], drawing.conditioning["encoder_hidden_states"])
    for before, after, row in zip(
        fed, [*(feed["sample"][0] for feed in fed[1:]), latents[-1]], euler.rows, strict=True
    ):
        sample = before["sample"][0]
        output = sample * np.float32(0.1 + 4 * (0.2 - 0.1))
        expected = row.transition[0][0] * sample + row.output[0] * output
        assert np.allclose(after, expected, atol=1e-5)
    assert len(seen) == 2 * STEPS
    assert np.array_equal(guide(np.ones((1, 4, 2, 2), np.float32), 7.0), np.ones((4, 2, 2), np.float32))


def test_nothing_to_calibrate_with_is_said(exact: Path, tmp_path: Path) -> None:
    """Without feeds there is an error, and no file."""
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        quantize_unet(exact, tmp_path / "x.onnx", iter(()))
    assert list(tmp_path.iterdir()) == []
