"""What we compute today is what the golden files say: another implementation may rely on them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridsd import codec
from hybridsd.closed_loop import Residual, Track, checksum, follow, unpack
from hybridsd.plan import from_json, initial_state
from hybridsd.v1 import tensor_pb2
from tests.support.reference import run_from_seed

_spec = importlib.util.spec_from_file_location("golden", Path(__file__).parent / "golden.py")
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

FILES = sorted(path.name for path in golden.FOLDER.glob("*.json"))


def assert_close(expected: Any, actual: Any, where: str = "") -> None:
    """Compares two JSON values: numbers to 1e-5 (libm differs in the last place), everything else exactly."""
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys(), where
        for key in expected:
            if key not in ("sha256", "checksum", "data", "values"):  # of numbers that may differ in the last place
                assert_close(expected[key], actual[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(actual), where
        for index, (x, y) in enumerate(zip(expected, actual, strict=True)):
            assert_close(x, y, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5), where
    else:
        assert expected == actual, where


def test_every_golden_file_is_current() -> None:
    """Compiling and running again gives the committed numbers, file by file."""
    current = golden.golden()

    assert sorted(current) == FILES
    for name, content in current.items():
        assert_close(json.loads((golden.FOLDER / name).read_text()), json.loads(json.dumps(content)), name)


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int8z"])
def test_committed_tensors_are_decoded(name: str) -> None:
    """Whatever stream the bytes are packed in, and whether they are differences or not."""
    content = json.loads((golden.FOLDER / "tensors.json").read_text())
    said = content["encodings"][name]
    for data in said.get("streams", [said.get("data")]):
        message = tensor_pb2.Tensor(
            encoding=said["encoding"], shape=content["shape"], data=bytes.fromhex(data), scale=said["scale"]
        )
        np.testing.assert_array_equal(
            codec.decode_tensor(message).reshape(-1), np.array(said["decoded"], dtype=np.float32)
        )


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("plan_")])
def test_committed_plan_runs_like_a_fresh_one(name: str) -> None:
    """The committed plan and the one compiled now take the same latents to the same image; its digest is right."""
    text = (golden.FOLDER / name).read_text()
    committed = from_json(text)
    fresh = from_json(json.dumps(golden.golden_plan(committed.scheduler, committed.num_inference_steps)))
    runs = [list(run_from_seed(plan, golden.predict, seed=5, shape=(4, 4, 4))) for plan in (committed, fresh)]

    assert committed.digest().hex() == json.loads(text)["sha256"]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(
            a.state[0], b.state[0], rtol=0, atol=2e-5 * max(1.0, float(np.abs(a.state[0]).max()))
        )


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("trajectory_")])
def test_committed_trajectory_is_reproduced(name: str) -> None:
    """Executing the committed plan from the noise of its seed gives every committed state."""
    content = json.loads((golden.FOLDER / name).read_text())
    plan, shape = from_json(json.dumps(content["plan"])), tuple(content["shape"])
    seed, image_index = content["seed"], content["image_index"]
    run = run_from_seed(plan, golden.predict, seed=seed, image_index=image_index, shape=shape)

    for expected, actual in zip(content["states"], run, strict=True):
        assert expected["call"] == actual.call
        for x, y in zip(expected["arrays"], actual.state, strict=True):
            np.testing.assert_allclose(x, y.reshape(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("residuals_")])
def test_committed_residuals_lead_to_their_states(name: str) -> None:
    """Following the committed messages from the noise on gives the committed arrays, bit for bit."""
    content = json.loads((golden.FOLDER / name).read_text())
    plan, shape = from_json(json.dumps(content["plan"])), tuple(content["shape"])

    def draw_noise(call: int) -> np.ndarray:
        return np.array(content["noise"][call], np.float32).reshape(shape)

    latents = np.array(content["latents"], np.float32).reshape(shape)
    track = Track.begin(0, initial_state(plan, latents))
    widths = set()
    for state in content["states"]:
        residuals = []
        for each in state["residuals"]:
            data = bytes.fromhex(each["data"])
            assert unpack(data, shape).reshape(-1).tolist() == each["values"]
            widths.add(max(map(abs, each["values"])) > 127)
            residuals.append(Residual(each["call"], each["step"], data))
        track = follow(plan, track, state["call"], residuals, draw_noise)
        assert [array.reshape(-1).tolist() for array in track.state] == state["arrays"]
        assert checksum(track.state) == state["checksum"]
    assert widths == {False, True}
