"""A whole edge bundle of seeded toy models, made with onnx.helper in a fraction of a second. Knows no torch.

    python tests/support/tiny_bundle.py DIR [--latent-space NAME]

The U-Net is one 3x3 convolution plus what the text and the time add to each channel; `TinyUNet` is the same in numpy,
so that a test can say what an image must be. Plans are made by hand: one state, two states, noise, two calls a step.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
import tokenizers
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hybridsd import manifest as manifests
from hybridsd import plan as plans
from hybridsd.plan import Plan, PlanRow

CHANNELS, CONTEXT_LENGTH, EMBED_DIM, CELL = 4, 12, 8, 8
EMBED_DIM_2, POOLED_DIM = 12, 10
"""Of the second text encoder of the kinds of SDXL."""
Kind = Literal["sd", "fused", "lcm", "sdxl", "sdxl-fused", "sdxl-lcm"]
"""fused computes what sd does and takes both texts and the guidance, lcm takes the guidance; of one seed, sd and fused
have the same weights, as have sdxl and sdxl-fused."""
LATENT_SPACE = "tiny-test"
WORDS = [
    "a",
    "an",
    "the",
    "red",
    "blue",
    "green",
    "fox",
    "donut",
    "cat",
    "dog",
    "left",
    "right",
    "of",
    "to",
    "on",
    "under",
    "and",
    "background",
    "no",
    "text",
    "blurry",
]
Floats = NDArray[np.float32]


class TinyUNet:
    """The toy U-Net in numpy, from a seed."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kernel: Floats = (rng.normal(size=(CHANNELS, CHANNELS, 3, 3)) * 0.12).astype(np.float32)
        self.text: Floats = (rng.normal(size=(EMBED_DIM, CHANNELS)) * 0.5).astype(np.float32)
        self.time: Floats = (rng.normal(size=(1, CHANNELS)) * 0.0005).astype(np.float32)

    def __call__(self, sample: Floats, timestep: float, embeds: Floats) -> Floats:
        """Returns the output, [C, h, w], for latents [C, h, w] and embeddings [T, D]."""
        padded = np.pad(sample, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # [C, h, w, 3, 3]
        convolved = np.einsum("oikl,ihwkl->ohw", self.kernel, windows)
        added = embeds.mean(axis=0) @ self.text + np.float32(timestep) * self.time[0]
        return (convolved + added[:, None, None]).astype(np.float32)

    def guided(self, sample: Floats, timestep: float, embeds: Floats, negative: Floats | None, scale: float) -> Floats:
        """Returns the output after classifier-free guidance."""
        conditional = self(sample, timestep, embeds)
        if scale == 1:
            return conditional
        assert negative is not None
        unconditional = self(sample, timestep, negative)
        return unconditional + np.float32(scale) * (conditional - unconditional)


def make_plan(kind: str, num_steps: int) -> Plan:
    """Returns a hand-made, well-behaved plan.

    Args:
        kind: "ddim" (one state), "dpmpp_2m" (two), "lcm" (draws noise) or "heun" (two calls a step but the last).
        num_steps: The number of steps.
    """
    times = np.linspace(980, 20, num_steps)
    rows: list[PlanRow] = []
    for step in range(num_steps):
        last = step == num_steps - 1
        common = {"timestep": float(times[step]), "step": step}
        if kind == "ddim":
            rows.append(
                PlanRow(**common, unet_input=(1.0,), transition=((0.97,),), output=(-0.11,), noise=(0.0,),
                        x0_state=(1.1,), x0_output=-0.4)
            )  # fmt: skip
        elif kind == "lcm":
            rows.append(
                PlanRow(**common, unet_input=(1.0,), transition=((0.9,),), output=(-0.2,),
                        noise=(0.0 if last else 0.3,), x0_state=(1.05,), x0_output=-0.3)
            )  # fmt: skip
        elif kind == "dpmpp_2m":  # with a negative zero, as compiled plans have them
            n = 1 if step == 0 else 2
            old = (0.05,) if n == 2 else ()
            sample = (0.96, *old)
            rows.append(
                PlanRow(**common, unet_input=(1.0, 0.0)[:n], x0_state=(1.08, 0.0)[:n], x0_output=-0.35,
                        transition=(sample,) if last else (sample, (0.2, 0.0)[:n]),
                        output=(-0.1,) if last else (-0.1, 0.7), noise=(0.0,) if last else (0.0, -0.0))
            )  # fmt: skip
        else:
            assert kind == "heun"
            rows.append(
                PlanRow(**common, unet_input=(1.0,), transition=((0.97,),) if last else ((0.97,), (1.0,)),
                        output=(-0.1,) if last else (-0.1, 0.05), noise=(0.0,) if last else (0.0, 0.0),
                        x0_state=(1.1,), x0_output=-0.4)
            )  # fmt: skip
            if not last:
                rows.append(
                    PlanRow(timestep=float(times[step]) - 10, step=step, unet_input=(1.0, 0.0),
                            transition=((0.4, 0.57),), output=(-0.06,), noise=(0.0,), x0_state=(1.1, 0.0),
                            x0_output=-0.4)
                )  # fmt: skip
    return Plan(scheduler=kind, num_inference_steps=num_steps, init_noise_sigma=1.0, rows=tuple(rows))


def _save(folder: Path, name: str, nodes: list, inputs: list, output: tuple, constants: dict) -> None:
    values = [
        helper.make_tensor_value_info(what, kind, shape) for what, kind, shape in inputs
    ]  # fmt: skip
    result = helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])
    initializers = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, name, values, [result], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / f"{name}.onnx"))


def _save_models(folder: Path, seed: int, cell: int, kind: Kind) -> None:
    node, f, i = helper.make_node, TensorProto.FLOAT, TensorProto.INT64
    unet, rng = TinyUNet(seed), np.random.default_rng(1000 + seed)
    latents = ["B", CHANNELS, "h", "w"]
    width = _embed_dim(kind)
    text = np.resize(unet.text, (width, CHANNELS))
    more_nodes, more_inputs, more = _conditions(kind, rng)
    nodes = [
        *more_nodes,
        node("Conv", ["sample", "kernel"], ["convolved"], pads=[1, 1, 1, 1]),
        node("ReduceMean", ["encoder_hidden_states", "axis1"], ["mean"], keepdims=0),
        node("MatMul", ["mean", "text"], ["from_text"]),
        node("Unsqueeze", ["timestep", "axis1"], ["column"]),
        node("MatMul", ["column", "time"], ["from_time"]),
        node("Add", ["from_text", "from_time"], ["added_text"]),
        node("Add", ["added_text", "from_rest"], ["added"]),
        node("Unsqueeze", ["added", "axes23"], ["spread"]),
        node("Add", ["convolved", "spread"], ["noise_pred"]),
    ]
    inputs: list[Any] = [
        ("sample", f, latents),
        ("timestep", f, ["B"]),
        ("encoder_hidden_states", f, ["B", "T", width]),
    ]
    inputs += more_inputs
    if kind in ("fused", "sdxl-fused"):
        nodes, inputs, more = _fused(nodes, inputs, more)
    _save(
        folder, "unet", nodes, inputs,
        ("noise_pred", latents),
        {
            **more, "kernel": unet.kernel, "text": text, "time": unet.time,
            "axis1": np.array([1]), "axes23": np.array([2, 3]),
        },
    )  # fmt: skip
    table = rng.normal(size=(len(WORDS) + 4, EMBED_DIM)).astype(np.float32)
    _save(
        folder, "text_encoder", [node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        [("input_ids", i, ["B", "T"])], ("last_hidden_state", ["B", "T", EMBED_DIM]), {"table": table},
    )  # fmt: skip
    if _is_sdxl(kind):
        _save_second_text_encoder(folder, rng)
    _save(
        folder, "vae_decoder",
        [
            node("Conv", ["latents", "kernel"], ["rgb"]),
            node("Resize", ["rgb", "", "scales"], ["large"], mode="nearest"),
            node("Tanh", ["large"], ["image"]),
        ],
        [("latents", f, latents)], ("image", ["B", 3, "H", "W"]),
        {
            "kernel": rng.normal(size=(3, CHANNELS, 1, 1)).astype(np.float32),
            "scales": np.array([1, 1, cell, cell], dtype=np.float32),
        },
    )  # fmt: skip
    _save(
        folder, "vae_encoder",
        [
            node("AveragePool", ["image"], ["small"], kernel_shape=[cell, cell], strides=[cell, cell]),
            node("Conv", ["small", "kernel"], ["latents"]),
        ],
        [("image", f, ["B", 3, "H", "W"])], ("latents", latents),
        {"kernel": rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32)},
    )  # fmt: skip


def _is_sdxl(kind: Kind) -> bool:
    return kind.startswith("sdxl")


def _is_lcm(kind: Kind) -> bool:
    return kind in ("lcm", "sdxl-lcm")


def _embed_dim(kind: Kind) -> int:
    return EMBED_DIM + EMBED_DIM_2 if _is_sdxl(kind) else EMBED_DIM


def _conditions(kind: Kind, rng: np.random.Generator) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Returns nodes, inputs and constants of what a U-Net takes beside text; "from_rest" is what it adds."""
    node, f = helper.make_node, TensorProto.FLOAT
    nodes: list[Any] = []
    inputs: list[Any] = []
    constants: dict[str, Any] = {}
    terms: list[str] = []
    if _is_sdxl(kind):
        nodes += [
            node("Mul", ["time_ids", "small"], ["sizes"]),
            node("Concat", ["text_embeds", "sizes"], ["joined"], axis=1),
            node("MatMul", ["joined", "rest"], ["from_pooled"]),
        ]
        inputs += [("text_embeds", f, ["B", POOLED_DIM]), ("time_ids", f, ["B", 6])]
        constants["rest"] = (rng.normal(size=(POOLED_DIM + 6, CHANNELS)) * 0.1).astype(np.float32)
        constants["small"] = np.array([0.01], dtype=np.float32)
        terms.append("from_pooled")
    if _is_lcm(kind):
        nodes += [
            node("Unsqueeze", ["guidance_scale", "axis1"], ["scale"]),
            node("MatMul", ["scale", "guide"], ["from_guidance"]),
        ]
        inputs.append(("guidance_scale", f, ["B"]))
        constants["guide"] = (rng.normal(size=(1, CHANNELS)) * 0.05).astype(np.float32)
        terms.append("from_guidance")
    if terms:
        nodes.append(node("Sum", terms, ["from_rest"]))
    else:
        constants["from_rest"] = np.zeros((1, CHANNELS), dtype=np.float32)
    return nodes, inputs, constants


def _fused(
    nodes: list[Any], inputs: list[Any], constants: dict[str, Any]
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Returns a U-Net of two rows, unconditional first, as one of a row that takes the guidance."""
    node, f = helper.make_node, TensorProto.FLOAT
    doubled, both = [], []
    for name, kind, shape in inputs:
        first, second = {
            "encoder_hidden_states": ("negative_prompt_embeds", "prompt_embeds"),
            "text_embeds": ("negative_text_embeds", "text_embeds"),
        }.get(name, (name, name))
        doubled += [(one, kind, shape) for one in dict.fromkeys((first, second))]
        both.append(node("Concat", [first, second], [f"two_{name}"], axis=0))
    names = {name: f"two_{name}" for name, _, _ in inputs} | {"noise_pred": "rows"}
    for each in nodes:
        each.input[:] = [names.get(name, name) for name in each.input]
        each.output[:] = [names.get(name, name) for name in each.output]
    guide = [
        node("Split", ["rows"], ["unconditional", "conditional"], axis=0, num_outputs=2),
        node("Sub", ["conditional", "unconditional"], ["difference"]),
        node("Unsqueeze", ["guidance_scale", "axes123"], ["scale"]),
        node("Mul", ["scale", "difference"], ["step"]),
        node("Add", ["unconditional", "step"], ["noise_pred"]),
    ]
    return (
        [*both, *nodes, *guide],
        [*doubled, ("guidance_scale", f, ["B"])],
        {**constants, "axes123": np.array([1, 2, 3])},
    )


def _save_second_text_encoder(folder: Path, rng: np.random.Generator) -> None:
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
            node("ReduceMean", ["last_hidden_state", "axis1"], ["mean"], keepdims=0),
            node("MatMul", ["mean", "project"], ["text_embeds"]),
        ],
        "text_encoder_2",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["B", "T", EMBED_DIM_2]),
            helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["B", POOLED_DIM]),
        ],
        [
            numpy_helper.from_array(rng.normal(size=(len(WORDS) + 4, EMBED_DIM_2)).astype(np.float32), "table"),
            numpy_helper.from_array(rng.normal(size=(EMBED_DIM_2, POOLED_DIM)).astype(np.float32), "project"),
            numpy_helper.from_array(np.array([1]), "axis1"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / "text_encoder_2.onnx"))


def _save_tokenizer(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<begin>", "<end>", "<unknown>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 1), ("<end>", 2)]
    )
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(length=CONTEXT_LENGTH, pad_id=0, pad_token="<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))


def default_plans() -> dict[str, Plan]:
    """Returns the plans of the bundle, by "scheduler/steps"."""
    pairs = [("ddim", 6), ("ddim", 4), ("dpmpp_2m", 6), ("lcm", 4), ("heun", 4)]
    return {f"{kind}/{steps}": make_plan(kind, steps) for kind, steps in pairs}


def write_bundle(
    folder: Path,
    *,
    seed: int = 0,
    latent_space: str = LATENT_SPACE,
    guidance_scale: float = 3.0,
    cell: int = CELL,
    more_plans: Mapping[str, Plan] = MappingProxyType({}),
    kind: Kind = "sd",
    prediction_type: str = "epsilon",
    safety_score: float | None = None,
    max_timestep: float | None = None,
    high_noise_seed: int | None = None,
) -> manifests.Manifest:
    """Writes a bundle; returns its manifest. The default image is 32x32, 6 steps of ddim, 3 of them the cloud's.

    Args:
        folder: Where to; made if missing.
        seed: Selects the weights.
        latent_space: What the manifest says.
        guidance_scale: The default.
        cell: Pixels that a latent cell spans; the default with `latent_space="tiny"` pairs with `tiny_pipeline`.
        more_plans: Beside `default_plans`, by "scheduler/steps".
        kind: What the U-Net takes: text, both texts and the guidance too, or the pooled text and sizes of SDXL.
        prediction_type: What the manifest says.
        safety_score: What a safety checker says of every image; None leaves it out.
        max_timestep: What the manifest says.
        high_noise_seed: Selects the weights of the U-Net for the timesteps above that; None leaves it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if high_noise_seed is not None:
        _save_models(folder, high_noise_seed, cell, kind)
        (folder / "unet.onnx").rename(folder / "unet_high_noise.onnx")
    _save_models(folder, seed, cell, kind)
    _save_tokenizer(folder)
    table = {name: json.loads(plans.to_json(plan)) for name, plan in {**default_plans(), **more_plans}.items()}
    (folder / "plans.json").write_text(json.dumps(table), encoding="utf-8")
    roles = {role: f"{role}.onnx" for role in ("unet", "text_encoder", "vae_decoder", "vae_encoder")}
    if safety_score is not None:
        _save(
            folder, "safety_checker",
            [
                helper.make_node("ReduceMean", ["clip_input", "axes123"], ["mean"], keepdims=0),
                helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
                helper.make_node("Unsqueeze", ["nothing", "axis1"], ["column"]),
                helper.make_node("Add", ["column", "said"], ["scores"]),
            ],
            [("clip_input", TensorProto.FLOAT, ["B", 3, 224, 224])], ("scores", ["B", 2]),
            {
                "axes123": np.array([1, 2, 3]), "axis1": np.array([1]), "zero": np.zeros(1, dtype=np.float32),
                "said": np.array([[-1.0, safety_score]], dtype=np.float32),
            },
        )  # fmt: skip
        roles["safety_checker"] = "safety_checker.onnx"
    if _is_sdxl(kind):
        roles["text_encoder_2"] = "text_encoder_2.onnx"
    if high_noise_seed is not None:
        roles["unet_high_noise"] = "unet_high_noise.onnx"
    roles |= {"tokenizer": "tokenizer.json", "plans": "plans.json"}
    manifest = manifests.Manifest(
        name="tiny-edge",
        latent_space=latent_space,
        latent_channels=CHANNELS,
        vae_scale_factor=cell,
        scaling_factor=1.0,
        size_multiple=2 * cell,
        prediction_type=prediction_type,
        context_length=CONTEXT_LENGTH,
        embed_dim=_embed_dim(kind),
        guidance="embedded" if _is_lcm(kind) else "cfg",
        pooled_dim=POOLED_DIM if _is_sdxl(kind) else 0,
        force_zeros_for_empty_prompt=_is_sdxl(kind),
        num_parameters={"unet": CHANNELS * CHANNELS * 9 + EMBED_DIM * CHANNELS + CHANNELS},
        defaults=manifests.Defaults(
            scheduler="lcm" if _is_lcm(kind) else "ddim",
            num_inference_steps=4 if _is_lcm(kind) else 6,
            guidance_scale=guidance_scale,
            width=32,
            height=32,
            cloud_steps=2 if _is_lcm(kind) else 3,
        ),
        files={role: manifests.describe_file(folder, path) for role, path in roles.items()},
        description="Seeded toys for tests; draws nothing that means anything.",
        licence="Apache-2.0",
        max_timestep=max_timestep,
    )
    manifests.write_manifest(manifest, folder)
    return manifest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes a bundle of toy models.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latent-space", default=LATENT_SPACE)
    arguments = parser.parse_args()
    write_bundle(arguments.folder, latent_space=arguments.latent_space)
