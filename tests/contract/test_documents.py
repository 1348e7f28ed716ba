"""What a client in another language is told is what the code does: the pages name every field, and no other."""

import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np

from cloud_server.engine.engine import Engine
from edge_client.inference.networks import INPUTS
from hybridsd import codec, noise, noise_levels
from hybridsd.manifest import OPTIONAL_ROLES, REQUIRED_ROLES, Defaults, Manifest
from hybridsd.plan import Plan, PlanRow
from hybridsd.prompting import BRACKET_WEIGHT, MAX_WEIGHT

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
NUMERICS = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """Returns what stands below a heading, up to the next."""
    return re.split(r"^#+ ", page, flags=re.MULTILINE)[
        1 + [line.lstrip("# ") for line in page.splitlines() if re.match(r"#+ ", line)].index(title)
    ]


def names(text: str) -> set[str]:
    """Returns the words in backticks and quotes."""
    return set(re.findall(r"[`\"]([A-Za-z0-9_]+)", text))


def test_every_key_of_the_manifest() -> None:
    """The table has a row for each field of `model.json`, and each default."""
    told = names(section(PROTOCOL, "The manifest, `model.json`"))

    assert {field.name for field in dataclasses.fields(Manifest)} <= told
    assert {field.name for field in dataclasses.fields(Defaults)} <= told


def test_every_input_of_the_onnx_files() -> None:
    """The table names every role that is a network, and every input of each."""
    told = names(section(PROTOCOL, "The ONNX files"))
    roles = {role for role in (*REQUIRED_ROLES, *OPTIONAL_ROLES) if not role.endswith("_data")}

    assert set(INPUTS) <= told
    assert {name for kinds in INPUTS.values() for kind in kinds for name in kind} <= told
    assert roles - {"plans", "licence"} <= told


def test_every_field_of_a_plan() -> None:
    """What `plans.json` has is said, or a field of the message."""
    told = names(section(PROTOCOL, "`plans.json`"))
    message = (ROOT / "protos/hybridsd/v1/plan.proto").read_text(encoding="utf-8")

    assert {field.name for field in dataclasses.fields(Plan)} <= told
    assert all(f" {field.name} = " in message for field in dataclasses.fields(PlanRow))


def test_how_long_a_job_is_recent() -> None:
    """The numbers of the page are the engine's defaults."""
    defaults = inspect.signature(Engine).parameters

    assert f"The last {defaults['keep_finished'].default} jobs" in PROTOCOL
    assert f"for {defaults['keep_finished_s'].default:g} s" in PROTOCOL


def test_int8_is_rounded_as_written() -> None:
    """Largest magnitude / 127, ties to even, rows of zeros with scale 0."""
    values = np.array([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    message = codec.encode_tensor(values, codec.INT8)

    assert list(message.scale) == [1.0, 0.0]
    assert np.frombuffer(message.data, dtype=np.int8).tolist() == [127, 0, 2, -2, 0, 0, 0, 0]


def test_an_image_enters_as_written() -> None:
    """The first state of a plan that begins late, by the formula of the page."""
    row = PlanRow(
        timestep=500.0, step=0, unet_input=(0.5,), transition=((1.0,),), output=(0.0,), noise=(0.0,),
        x0_state=(1.0,), x0_output=-2.0,
    )  # fmt: skip
    plan = Plan(scheduler="x", num_inference_steps=1, init_noise_sigma=1.0, rows=(row,))
    image, drawn = noise.initial_latents(1, 0, (1, 2, 2)), noise.initial_latents(2, 0, (1, 2, 2))
    (state,) = noise_levels.begin_from(plan, image, drawn, "epsilon")
    alpha = 1 / np.sqrt(1 + 2.0**2)

    np.testing.assert_allclose(state, (alpha * image + 2 * alpha * drawn) / 0.5, rtol=1e-5)
    assert "`[(alpha k + sigma z) / unet_input[0]]`" in NUMERICS


def test_the_numbers_of_weights() -> None:
    """The page has the limits of the code."""
    told = section(NUMERICS, "Prompts")

    assert f"by {BRACKET_WEIGHT:g}" in told
    assert f"[0, {MAX_WEIGHT:g}]" in told
    assert f"[1/{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]" in told
