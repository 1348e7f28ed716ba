"""What states cost on the way and what the image loses by it: `python -m tests.benchmarks.bench_states`.

One job of 512x512: its latents are cut into 16 tiles of the demo family's own size, each an image of its own. After the
cloud's steps the edge draws the rest from what the states were on the way. Prints bytes of all states and of the
hand-off alone, the PSNR of each tile to that from the exact state, and what a state takes to write and to read.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.engine.events import Snapshot
from cloud_server.engine.request import JobRequest
from cloud_server.models.denoiser import Conditions
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.rpc.write_states import ResidualCoding, StateWriter
from deploy.run_demo import DEMO
from edge_client.inference.models import Models
from edge_client.types import Conditioning
from hybridsd import closed_loop, codec, noise
from hybridsd.closed_loop import Track, precision_of
from hybridsd.manifest import read_manifest
from hybridsd.plan import Plan, denoise, initial_state
from hybridsd.prompting import TextOptions
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.benchmarks.common import machine, say

F32 = NDArray[np.float32]
NAMES = ("fox", "donut", "rocket", "cat", "pizza", "car", "tree", "moon")
SCHEDULERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral", "unipc", "pndm", "heun")
PSNRS = (54.0, 64.0, 76.0, 88.0)
SIDE, SEED = 4, 0


class Job:
    """16 images as one, up to the hand-off."""

    def __init__(self, model: Model, edge: Models, scheduler: str, *, steps: int, k: int, guidance: float) -> None:
        self.model, self.edge, self.guidance = model, edge, guidance
        self.plan: Plan = model.plans.plan(scheduler, steps)
        self.handoff = self.plan.first_call(k)
        cells = edge.manifest.defaults.height // edge.manifest.vae_scale_factor
        self.shape = (edge.manifest.latent_channels, SIDE * cells, SIDE * cells)
        self.texts = [
            tuple(model.denoiser.encode(words, TextOptions()).embeds for words in ("", _prompt(index)))
            for index in range(SIDE * SIDE)
        ]
        rows = np.stack([text for pair in self.texts for text in pair])
        self._conditions = Conditions(torch.from_numpy(rows).to(model.denoiser.device, model.denoiser.dtype))
        first = initial_state(self.plan, noise.initial_latents(SEED, 0, self.shape))
        begin = time.process_time()
        run = list(denoise(self.plan, first, self._large, self.draw_noise, stop=self.handoff))
        self.call_s = (time.process_time() - begin) / self.handoff
        self.events = [Snapshot(each.call, tuple(each.state), None, each.call == self.handoff) for each in run]
        self.exact = self.finish(self.events[-1].arrays)

    def draw_noise(self, call: int) -> F32:
        """Returns the noise of a call."""
        return noise.call_noise(SEED, 0, call, self.shape)

    def _large(self, x: F32, t: float) -> F32:
        denoiser = self.model.denoiser
        sample = torch.from_numpy(np.repeat(_cut(x), 2, axis=0)).to(denoiser.device)
        with torch.inference_mode():
            output = denoiser.predict(sample, torch.full((len(sample),), t), self._conditions).cpu().numpy()
        return _join(output[::2] + np.float32(self.guidance) * (output[1::2] - output[::2]))

    def _small(self, x: F32, t: float) -> F32:
        outputs = [
            self.edge.predict_noise(
                tile, t, Conditioning(prompt_embeds=pair[1], negative_prompt_embeds=pair[0]),
                guidance_scale=self.guidance,
            )
            for tile, pair in zip(_cut(x), self.texts, strict=True)
        ]  # fmt: skip
        return _join(np.stack(outputs))

    def finish(self, state: Sequence[F32]) -> list[F32]:
        """Returns the images that the edge makes of a state at the hand-off."""
        *_, done = denoise(self.plan, list(state), self._small, self.draw_noise, start=self.handoff)
        return [self.edge.decode(tile) for tile in _cut(done.state[0])]

    def messages(self, events: Sequence[Snapshot], encoding: Any, coding: ResidualCoding | None) -> list[pb.State]:
        """Returns states as a server sends them."""
        request = JobRequest(
            request_id="bench", content=b"", model="large", prompt="", latent_shape=self.shape, plan=self.plan,
            handoff_call=self.handoff, seed=SEED, state_every=int(len(events) > 1),
        )  # fmt: skip
        writer = StateWriter(request, encoding, coding, resume_call=0)
        return [writer.message(event) for event in events]

    def read(self, messages: Sequence[pb.State]) -> Sequence[F32]:
        """Returns the last state as an edge reads them."""
        track = Track.begin(0, initial_state(self.plan, noise.initial_latents(SEED, 0, self.shape)))
        for message in messages:
            if message.HasField("checksum"):
                residuals = [codec.decode_residual(each) for each in message.residuals]
                track = closed_loop.follow(self.plan, track, message.call, residuals, self.draw_noise)
            else:
                track = Track.begin(message.call, [codec.decode_tensor(array) for array in message.arrays])
        return track.state


def rows(job: Job, psnrs: Sequence[float]) -> Iterator[tuple[str, int, int, list[float], float, float]]:
    """Yields codec, bytes of all states, of the hand-off alone, PSNR of each image, and CPU seconds a state."""
    codings: list[tuple[str, Any, ResidualCoding | None]] = [
        ("fp16", codec.FLOAT16, None),
        ("int8", codec.INT8, None),
        *((f"residual, {psnr:g} dB", codec.FLOAT16, ResidualCoding(precision_of(psnr))) for psnr in psnrs),
    ]
    for name, encoding, coding in codings:
        messages, write_s = _timed(lambda coding=coding, encoding=encoding: job.messages(job.events, encoding, coding))
        state, read_s = _timed(lambda messages=messages: job.read(messages))
        (alone,) = job.messages(job.events[-1:], encoding, coding)
        found = [_psnr(*pair) for pair in zip(job.finish(state), job.exact, strict=True)]
        sizes = sum(message.ByteSize() for message in messages), alone.ByteSize()
        yield name, *sizes, found, write_s / len(messages), read_s / len(messages)


def bench_states(model: Model, bundle: Path, schedulers: Sequence[str], *, steps: int, k: int) -> None:
    """Prints a Markdown table."""
    manifest = read_manifest(bundle)
    edge = Models(bundle, manifest, threads=1)
    say(f"states at 512x512, {k} + {steps - k} steps, guidance {manifest.defaults.guidance_scale:g}:")
    say("| solver | codec | all states, KiB | hand-off alone | PSNR, mean | worst | write, ms | of a step | read, ms |")
    say("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for scheduler in schedulers:
        job = Job(model, edge, scheduler, steps=steps, k=k, guidance=manifest.defaults.guidance_scale)
        for name, sent, alone, found, write_s, read_s in rows(job, PSNRS):
            say(
                f"| {scheduler} | {name} | {sent / 1024:.1f} | {alone / 1024:.1f} | {np.mean(found):.1f} | "
                f"{min(found):.1f} | {1e3 * write_s:.2f} | {write_s / job.call_s:.2%} | {1e3 * read_s:.2f} |"
            )


def _prompt(index: int) -> str:
    one, other = NAMES[index % 8], NAMES[(index + 3) % 8]
    return f"a {one} to the left of a {other} on a {'blue' if index < 8 else 'green'} background"


def _cut(whole: F32) -> F32:
    """Returns the tiles of latents, [16, C, h, w]."""
    channels, height, width = whole.shape
    tiles = whole.reshape(channels, SIDE, height // SIDE, SIDE, width // SIDE)
    return np.ascontiguousarray(tiles.transpose(1, 3, 0, 2, 4)).reshape(-1, channels, height // SIDE, width // SIDE)


def _join(tiles: F32) -> F32:
    """Puts them together again."""
    _, channels, height, width = tiles.shape
    grid = tiles.reshape(SIDE, SIDE, channels, height, width).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(grid, dtype=np.float32).reshape(channels, SIDE * height, SIDE * width)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what it returns, and the CPU seconds that it takes: the least of three."""
    taken, result = [], None
    for _ in range(3):
        begin = time.process_time()
        result = work()
        taken.append(time.process_time() - begin)
    return result, min(taken)


def _psnr(image: F32, reference: F32) -> float:
    """Returns the PSNR of two images in [-1, 1], in dB."""
    return float(10 * np.log10(4.0 / max(float(np.mean((image - reference) ** 2)), 1e-12)))


def main() -> None:
    """Prints the table for the demo family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheduler", dest="schedulers", action="append", help="repeatable; default: one a family")
    parser.add_argument("--family", type=Path, default=DEMO)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    say(f"machine: {machine()}")
    model = load_model(f"bench={options.family / 'large'}", place(dtype="fp32"))
    steps, k = (4, 2) if options.smoke else (25, 8)
    schedulers = options.schedulers or (SCHEDULERS[1:2] if options.smoke else SCHEDULERS)
    bench_states(model, options.family / "edge", tuple(itertools.chain(schedulers)), steps=steps, k=k)


if __name__ == "__main__":
    main()
