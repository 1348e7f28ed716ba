"""Measures what the engine costs: 8 mixed jobs through it, against the bare U-Net on the same rows.

Run `OMP_NUM_THREADS=1 .venv/bin/python -m tests.unit.cloud_server.bench_engine [MODEL_FOLDER]`. The two are timed in
turns, so that a machine with other work to do slows both; the best round of each counts. Knows nothing of pytest.
"""

import asyncio
import sys
import time

import structlog
import torch
from diffusers import UNet2DConditionModel

from cloud_server.denoiser import Denoiser, DiffusersDenoiser
from cloud_server.devices import place
from cloud_server.engine import Engine
from cloud_server.jobs import Encoded, JobRequest, Snapshot, new_request_id
from cloud_server.mailbox import Mailbox
from cloud_server.models import load_model
from cloud_server.plans import PlanCompiler
from tests.unit.cloud_server.fakes import read_to_end

SHAPE = (4, 16, 16)
CALLS = 10
ROUNDS = 6
MIX = [
    ("dpmpp_2m", 25), ("ddim", 20), ("euler_ancestral", 30), ("pndm", 25),
    ("heun", 15), ("unipc", 25), ("lcm", 12), ("dpmpp_2m_sde", 25),
]  # fmt: skip


class Timed:
    """A denoiser that adds up the time of its calls, in processor seconds of the thread that makes them."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.device, self.dtype, self.encode = inner, inner.device, inner.dtype, inner.encode
        self.busy_s = 0.0
        self.first_s: float | None = None
        self.last_s = 0.0

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Passes on."""
        started_s = time.thread_time()
        output = self.inner.predict(sample, timesteps, embeds)
        self.last_s = time.thread_time()
        self.busy_s += self.last_s - started_s
        self.first_s = started_s if self.first_s is None else self.first_s
        return output


class DemoSized(DiffusersDenoiser):
    """A U-Net as large as the demo's, with random weights and no text encoder."""

    def encode(self, text: str) -> Encoded:
        """Returns numbers that depend on the length of the text only."""
        return Encoded(torch.full((32, 256), len(text) / 100).numpy())


def demo_sized() -> DemoSized:
    placement = place()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(96, 160, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256, attention_head_dim=(3, 5, 8),
    )  # fmt: skip
    unet.to(placement.device, placement.dtype).eval().requires_grad_(False)
    none = dict.fromkeys(("text_encoder", "tokenizer"), lambda *_: None)
    return DemoSized(unet=unet, context_length=32, device=placement.device, dtype=placement.dtype, **none)


async def main() -> None:
    """Prints the times of a step, the ratio, and how soon the last job of eight steps."""
    if len(sys.argv) > 1:
        model = load_model(sys.argv[1], place())
        denoiser, plans, embed = model.denoiser, model.plans, (model.info.context_length, model.info.embed_dim)
    else:
        denoiser, plans, embed = demo_sized(), PlanCompiler({"beta_schedule": "scaled_linear"}), (32, 256)
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    timed = Timed(denoiser)
    engine = Engine({"m": timed}, num_threads=1)
    engine.start()
    guided = [True, True, True, True, True, True, False, False]
    rows = sum(2 if is_guided else 1 for is_guided in guided)
    bare_s, engine_s, first_s = [], [], []
    for seed in range(ROUNDS + 1):
        with torch.inference_mode():
            sample, times = torch.randn(rows, *SHAPE), torch.linspace(1, 999, rows)
            embeds = torch.randn(rows, *embed).to(denoiser.dtype)
            started_s = time.perf_counter()
            for _ in range(CALLS):
                denoiser.predict(sample, times, embeds)
            bare_s.append((time.perf_counter() - started_s) / CALLS)
        requests = [
            JobRequest(
                request_id=new_request_id(), model="m", prompt="a", negative_prompt="" if is_guided else None,
                guidance_scale=4.0, seed=seed, latent_shape=SHAPE, plan=plans.plan(*mixed), handoff_call=CALLS,
                state_every=1,
            )
            for mixed, is_guided in zip(MIX, guided, strict=True)
        ]  # fmt: skip
        mailboxes = [Mailbox() for _ in requests]
        started_s = time.perf_counter()
        for request, mailbox in zip(requests, mailboxes, strict=True):
            engine.submit(request, mailbox)
        last: float | None = None
        while last is None:
            event = await mailboxes[-1].next(60.0)
            last = time.perf_counter() - started_s if isinstance(event, Snapshot) else None
        await asyncio.gather(*(read_to_end(mailbox) for mailbox in mailboxes))
        engine_s.append((time.perf_counter() - started_s) / CALLS)
        first_s.append(last / engine_s[-1])
    engine.stop()
    bare, through = min(bare_s[1:]), min(engine_s[1:])  # the first round warms up
    sys.stdout.write(
        f"rows {rows}, {denoiser.dtype}: bare call {1e3 * bare:.2f} ms, engine step {1e3 * through:.2f} ms, "
        f"throughput {bare / through:.3f} of bare; first state of the 8th job after {max(first_s[1:]):.2f} steps\n"
    )
    assert timed.first_s is not None
    share = 1.0 - timed.busy_s / (timed.last_s - timed.first_s)
    sys.stdout.write(f"share of the worker's processor time outside the U-Net: {100 * share:.2f} %\n")
    sys.stdout.write(f"bare {[round(1e3 * s, 2) for s in bare_s]}\nengine {[round(1e3 * s, 2) for s in engine_s]}\n")


if __name__ == "__main__":
    asyncio.run(main())
