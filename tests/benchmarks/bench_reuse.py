"""What approximate reuse costs in images: `python -m tests.benchmarks.bench_reuse --judge FOLDER`.

Replays a trace: scenes of the demo family, as often as Zipf's law says, each time in other words. A request whose
text is near to that of an earlier one of the same seed begins with its state after k' calls; the cloud runs the rest of
its 8 steps, the edge 17 more. The judge (training/evaluation, of a family's folder) reads off each image whether it
shows what its caption says. Every request is drawn exactly as well, from the same noise: the differences are paired.

`any seed` takes the nearest text of whatever seed, with its noise, as Nirvana does (Agarwal et al., 2024, arXiv
2312.04429): the server does not offer that. Not a test: nothing here passes or fails.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.engine.near import text_feature
from cloud_server.models.denoiser import Encoded
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from deploy.run_demo import DEMO
from edge_client.inference.models import Models
from edge_client.types import Conditioning
from hybridsd import noise
from hybridsd.manifest import read_manifest
from hybridsd.plan import Plan, advance, denoise, initial_state, unet_input
from hybridsd.prompting import TextOptions
from tests.benchmarks.common import machine, say
from training.data.scenes import Scene, caption, sample_scene
from training.evaluation.classifier import Classifier, labels_of, load_classifier

STEPS, SPLIT, MAX_CALLS = 25, 8, 3
GUIDANCE = 4.0
AT_ONCE = 4
State = list[torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """A request of the trace."""

    scene: Scene
    text: str
    seed: int


def trace(num_requests: int, num_scenes: int, *, exponent: float, one_seed: bool) -> list[Asked]:
    """Returns requests for scenes by Zipf's law; each says all of its scene in words of its own."""
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng) for _ in range(num_scenes)]
    weights = 1.0 / np.arange(1, num_scenes + 1) ** exponent
    found = []
    for number in range(num_requests):
        scene = scenes[rng.choice(num_scenes, p=weights / weights.sum())]
        text = caption(scene, rng, free=0.5)
        while scene.background not in text:
            text = caption(scene, rng, free=0.5)
        found.append(Asked(scene, text, 1 if one_seed else 1000 + number))
    return found


class Bench:
    """The models, and what was drawn with them."""

    def __init__(self, model: Model, edge: Models, judge: Classifier) -> None:
        self.model, self.edge, self.judge = model, edge, judge
        self.plan: Plan = model.plans.plan("dpmpp_2m", STEPS)
        self.empty = model.denoiser.encode("", TextOptions())
        side = model.info.default_size // model.info.vae_scale_factor
        self.shape = (model.info.latent_channels, side, side)

    def begin(self, seed: int) -> State:
        """Returns the state before the first call."""
        return initial_state(self.plan, torch.from_numpy(noise.initial_latents(seed, 0, self.shape)))

    def run_cloud(self, states: Sequence[State], texts: Sequence[Encoded], first: int) -> dict[int, list[State]]:
        """Runs the large model's calls from one on; returns all states by the call before which they are."""
        reached: dict[int, list[State]] = {first: list(states)}
        denoiser = self.model.denoiser
        for call in range(first, SPLIT):
            row, after = self.plan.rows[call], []
            for begin in range(0, len(states), AT_ONCE):
                part = reached[call][begin : begin + AT_ONCE]
                rows = [row_of for text in texts[begin : begin + AT_ONCE] for row_of in (self.empty, text)]
                conditions = denoiser.conditions(rows, size=(0, 0), guidance_scale=GUIDANCE)
                sample = torch.stack([unet_input(row, state) for state in part for _ in range(2)])
                output = denoiser.predict(sample, torch.full((2 * len(part),), row.timestep), conditions)
                for state, (free, bound) in zip(part, output.reshape(len(part), 2, *self.shape), strict=True):
                    after.append(advance(row, state, free + GUIDANCE * (bound - free), None))
            reached[call + 1] = after
        return reached

    def run_edge(self, state: State, text: Encoded) -> NDArray[np.float32]:
        """Runs the small model's steps, and decodes."""
        conditioning = Conditioning(prompt_embeds=text.embeds, negative_prompt_embeds=self.empty.embeds)

        def small(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
            return self.edge.predict_noise(x.astype(np.float32), t, conditioning, guidance_scale=GUIDANCE)

        *_, last = denoise(self.plan, [array.numpy() for array in state], small, lambda _call: None, start=SPLIT)
        return self.edge.decode(last.state[0].astype(np.float32))

    def judge_all(self, images: Sequence[NDArray[np.float32]], asked: Sequence[Asked]) -> NDArray[np.bool_]:
        """Returns whether each image shows all that its caption says."""
        read = self.judge.read(torch.from_numpy(np.stack(images))).numpy()
        labels = np.array([labels_of(one.scene) for one in asked])
        right: NDArray[np.bool_] = (read == labels).all(axis=1)
        return right


def neighbours(features: NDArray[np.float32], min_similarity: float) -> list[tuple[int, float] | None]:
    """Returns for each request the nearest earlier one that was run exactly, as the server would find it."""
    held: list[int] = []
    found: list[tuple[int, float] | None] = []
    for index, feature in enumerate(features):
        similar = features[held] @ feature if held else np.zeros(0)
        if len(similar) and similar.max() >= min_similarity:
            found.append((held[int(similar.argmax())], float(similar.max())))
        else:
            found.append(None)
            held.append(index)
    return found


@torch.inference_mode()
def replay(bench: Bench, asked: Sequence[Asked], name: str, ways: Sequence[tuple[float, Sequence[int]]]) -> None:
    """Draws a trace exactly and with reuse, and prints a row for each similarity and number of calls."""
    texts = [bench.model.denoiser.encode(one.text, TextOptions()) for one in asked]
    features = np.stack([text_feature(text, bench.empty) for text in texts])
    exact = bench.run_cloud([bench.begin(one.seed) for one in asked], texts, 0)
    images = [bench.run_edge(state, text) for state, text in zip(exact[SPLIT], texts, strict=True)]
    right = bench.judge_all(images, asked)
    say(f"| {name}, exact | | 0% | 0% | {100 * right.mean():.1f}% | | |")
    for min_similarity, calls in ways:
        found = neighbours(features, min_similarity)
        hits = [(index, near[0]) for index, near in enumerate(found) if near is not None]
        if not hits:
            say(f"| {name}, at least {min_similarity:g} | | 0% | 0% | | | |")
            continue
        for call in calls:
            those = [index for index, _ in hits]
            begun = bench.run_cloud([exact[call][near] for _, near in hits], [texts[index] for index in those], call)
            drawn = [bench.run_edge(state, texts[i]) for state, i in zip(begun[SPLIT], those, strict=True)]
            approximate = bench.judge_all(drawn, [asked[index] for index in those])
            whole = right.copy()
            whole[those] = approximate
            far = [float(np.sqrt(np.mean((a - images[i]) ** 2))) / 2 for a, i in zip(drawn, those, strict=True)]
            psnr = -20 * np.log10(np.mean(far))
            saved = call * len(hits) / (SPLIT * len(asked))
            say(
                f"| {name}, at least {min_similarity:g} | {call} | {100 * len(hits) / len(asked):.0f}% |"
                f" {100 * saved:.0f}% | {100 * whole.mean():.1f}% |"
                f" {100 * right[those].mean():.1f}% -> {100 * approximate.mean():.1f}% | {psnr:.1f} dB |"
            )


def main() -> None:
    """Replays the traces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", type=Path, required=True, help="a family's folder `classifier`")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(f"demo={DEMO / 'large'}", place("cpu", "fp32"))
    edge = Models(DEMO / "edge", read_manifest(DEMO / "edge"), provider="cpu", threads=options.threads)
    bench = Bench(model, edge, load_classifier(options.judge))
    say(f"machine: {machine()}")
    say(
        f"{options.requests} requests for {options.scenes} scenes, Zipf {options.exponent:g}, {SPLIT} + {STEPS - SPLIT}"
        " steps"
    )
    say("\n| trace, similarity | k' | hits | cloud steps saved | all right | of the hits: exact -> reused | PSNR |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one_seed, ways in (
        ("one seed", True, ((0.95, (1, 2, 3)), (0.8, (3,)))),
        ("any seed", False, ((0.95, (3,)),)),
    ):
        asked = trace(options.requests, options.scenes, exponent=options.exponent, one_seed=one_seed)
        replay(bench, asked, name, ways)


if __name__ == "__main__":
    main()
