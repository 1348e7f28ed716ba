"""`make bench`: what the product costs on this machine, as ratios inside one run.

Not a test: nothing here passes or fails. Each line names the aim. The default is the demo family; `--full` takes
full-size shapes with random weights: SD 1.4's 860M U-Net in the cloud, a 224M one at the edge, 512x512. `--smoke` runs
everything at its smallest size: its numbers say nothing, but all of it has run.
"""

import argparse
import asyncio
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import structlog
import torch

from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Snapshot
from cloud_server.engine.prefix_cache import prefix_digest
from cloud_server.engine.request import JobRequest
from cloud_server.models.denoiser import Conditions
from cloud_server.models.devices import place
from cloud_server.models.load import Model, ModelSpec, load_model
from cloud_server.models.registry import ModelRegistry
from cloud_server.models.served import FixedModels
from deploy.run_demo import BIN, DEMO, ENVIRONMENT, running_cloud
from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.types import CloudStarted
from edge_client.generation.events import Finished as EdgeFinished
from edge_client.generation.events import StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.inference.models import Models
from edge_client.request import Request
from edge_client.types import Conditioning
from hybridsd import codec, noise
from hybridsd.manifest import read_manifest
from hybridsd.plan import denoise, initial_state
from hybridsd.prompting import TextOptions
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.benchmarks.common import PROMPT, SETTLE_S, machine, say
from tests.load.clients import request_of
from tests.support.wire import measure

CHILD_PARTS = ("devices", "loading")
PARTS = ("engine", *CHILD_PARTS, "hybrid", "reuse", "wire", "codec", "start", "memory")
MIX = (
    # scheduler, guided: eight jobs that have nothing in common but the model
    ("dpmpp_2m", True), ("ddim", True), ("euler", True), ("pndm", True),
    ("unipc", True), ("euler_ancestral", True), ("dpmpp_2m_karras", False), ("lms", False),
)  # fmt: skip

ENGINE_PARTS = ("bare", "engine", "first")
"""Of `child`, which `bench_engine` takes."""


def mixed_jobs(model: Model, num_calls: int, first_id: int = 0) -> list[JobRequest]:
    """Returns eight jobs of the same number of calls, each with another scheduler, step count and seed."""
    info = model.info
    side = info.default_size // info.vae_scale_factor
    negative, prompt = (model.denoiser.encode(text, TextOptions()) for text in ("", PROMPT))
    jobs = []
    for index, (scheduler, guided) in enumerate(MIX):
        plan = model.plans.plan(scheduler, num_calls + 2 + index)
        jobs.append(
            JobRequest(
                request_id=f"bench-{first_id + index}",
                model=info.id,
                prompt=prompt,
                negative_prompt=negative if guided else None,
                guidance_scale=4.0 if guided else 1.0,
                seed=index,
                latent_shape=(info.latent_channels, side, side),
                plan=plan,
                handoff_call=num_calls,
                state_every=1,
            )
        )
    return jobs


def bare_loop_s(model: Model, jobs: Sequence[JobRequest], num_calls: int) -> float:
    """Times the batched U-Net alone, with the rows of the jobs: what no engine can beat."""
    rows = sum(1 if job.negative_prompt is None else 2 for job in jobs)
    sample = torch.randn(rows, *jobs[0].latent_shape)
    embeds = torch.randn(rows, model.info.context_length, model.info.embed_dim).to(model.denoiser.dtype)
    times = torch.linspace(900, 1, rows)
    device = model.denoiser.device
    sample, embeds, times = sample.to(device), embeds.to(device), times.to(device)
    with torch.inference_mode():
        begin = time.perf_counter()
        for _ in range(num_calls):
            output = model.denoiser.predict(sample, times, Conditions(embeds))
        output.cpu()
        return time.perf_counter() - begin


async def _drain(buffer: EventBuffer, on_state: Callable[[], None] | None = None) -> None:
    while True:
        event = await buffer.next(600.0)
        if isinstance(event, Snapshot) and on_state is not None:
            on_state()
            on_state = None
        if isinstance(event, Failed):
            raise event.error
        if event is None or isinstance(event, Finished):
            return


async def engine_s(
    model: Model, jobs: Sequence[JobRequest], threads: int, *, others: Sequence[Model] = (), max_batch: int = 8
) -> float:
    """Times the engine on the same jobs, from its start to the last hand-off; each other model is one more worker."""
    devices = [{model.info.id: each.denoiser} for each in (model, *others)]
    engine = Engine(FixedModels(*devices), max_batch=max_batch, num_threads=threads)
    boxes = [EventBuffer() for _ in jobs]
    for job, box in zip(jobs, boxes, strict=True):
        engine.submit(job, box)
    begin = time.perf_counter()
    engine.start()
    await asyncio.gather(*(_drain(box) for box in boxes))
    elapsed = time.perf_counter() - begin
    engine.stop()
    return elapsed


async def first_step_of_eighth(model: Model, tries: int, num_calls: int, threads: int) -> list[float]:
    """Times the first state of an eighth job that arrives while seven run."""
    times = []
    rng = np.random.default_rng(1)
    for attempt in range(tries):
        engine = Engine(FixedModels({model.info.id: model.denoiser}), max_batch=8, num_threads=threads)
        *seven, eighth = mixed_jobs(model, num_calls, first_id=100 * attempt)
        running = asyncio.Event()
        boxes = [EventBuffer() for _ in seven]
        for job, box in zip(seven, boxes, strict=True):
            engine.submit(job, box)
        engine.start()
        readers = [asyncio.create_task(_drain(box, running.set)) for box in boxes]
        await running.wait()
        await asyncio.sleep(float(rng.uniform(0, 1)) * engine.load().call_s)
        box, begin = EventBuffer(), time.perf_counter()
        engine.submit(eighth, box)
        reader = asyncio.create_task(_drain(box, lambda begin=begin: times.append(time.perf_counter() - begin)))
        await asyncio.gather(reader, *readers)
        engine.stop()
    return times


async def steps_beside_loading(
    model: Model, large: Path, threads: int, *, num_loads: int, num_quiet: int
) -> list[float]:
    """Times the steps of a job while other models are loaded beside it, and while none is.

    Returns:
        How many steps were quiet, and how many beside a load; then the times of them all, and of the loads.
    """
    registry = ModelRegistry([model.denoiser.device], dtype=model.denoiser.dtype)
    registry.adopt(model, ModelSpec(source=f"bench={large}"))
    described = registry.catalog["bench"]
    side = described.info.default_size // described.info.vae_scale_factor
    plan = described.plans.plan("ddim", 900)
    job = JobRequest(
        request_id="", model="bench", prompt=PROMPT, negative_prompt="", guidance_scale=4.0, plan=plan,
        latent_shape=(described.info.latent_channels, side, side), handoff_call=len(plan.rows), state_every=1,
    )  # fmt: skip
    engine, steps = Engine(registry, num_threads=threads), list[float]()
    engine.start()

    async def run_jobs() -> None:
        for number in itertools.count():
            box, last_s = EventBuffer(), 0.0
            engine.submit(replace(job, request_id=f"bench-loading-{number}"), box)
            while not isinstance(event := await box.next(600.0), Finished):
                now_s = time.perf_counter()
                if isinstance(event, Snapshot) and event.call > 2:  # between two jobs is no step
                    steps.append(now_s - last_s)
                last_s = now_s

    async def wait_for(num_steps: int) -> None:
        until = len(steps) + num_steps
        while len(steps) < until:  # noqa: ASYNC110  (they are counted)
            await asyncio.sleep(0.01)

    runner = asyncio.create_task(run_jobs())
    quiet: list[float] = []
    beside: list[float] = []
    loads: list[float] = []
    await wait_for(3)
    for number in range(num_loads):
        begin = len(steps)
        await wait_for(num_quiet)
        quiet += steps[begin:]
        begin, begin_s = len(steps), time.perf_counter()
        (load,) = registry.load(ModelSpec(source=f"other-{number}={large}"))
        await asyncio.wrap_future(load)
        loads.append(time.perf_counter() - begin_s)
        await wait_for(1)
        beside += steps[begin:]
        await asyncio.wrap_future(registry.unload(f"other-{number}"))
    runner.cancel()
    engine.stop()
    registry.close()
    registry.join(10.0)
    return [float(len(quiet)), float(len(beside)), *quiet, *beside, *loads]


def in_child(what: str, large: Path, dtype: str, repeats: int, num_calls: int) -> dict[str, list[float]]:
    """Runs `child` in a process of its own: two pools of OpenMP threads in one process spoil each other's times."""
    words = ["--child", what, "--family", str(large.parent), "--dtype", dtype, "--repeats", str(repeats)]
    command = [sys.executable, "-m", "tests.benchmarks.bench", *words, "--calls", str(num_calls)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def child(what: str, large: Path, dtype: str, repeats: int, num_calls: int) -> dict[str, list[float]]:
    """Returns times in seconds of each part of `what`, separated by commas.

    They are "bare" loops, "engine" runs, runs of one and of two "devices" in turns, "first" states of an eighth job, or
    what `steps_beside_loading` returns.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server does: the models are loaded without a pool of threads

    def load() -> Model:
        return load_model(f"bench={large}", place(dtype=dtype))

    model = load()
    times: dict[str, list[float]] = {}
    for part in what.split(","):
        if part == "loading":
            beside = steps_beside_loading(model, large, threads, num_loads=repeats, num_quiet=10 * num_calls)
            times[part] = asyncio.run(beside)
        else:
            times[part] = _times(part, model, load, threads, repeats, num_calls)
    return times


def _times(
    what: str, model: Model, load: Callable[[], Model], threads: int, repeats: int, num_calls: int
) -> list[float]:
    times: list[float] = []

    def bare() -> None:
        torch.set_num_threads(threads)
        jobs = mixed_jobs(model, num_calls)
        bare_loop_s(model, jobs, 2)
        times.extend(bare_loop_s(model, jobs, num_calls) for _ in range(repeats))

    if what == "bare":
        worker = threading.Thread(target=bare)
        worker.start()
        worker.join()
    elif what == "devices":
        other = load()
        for repeat in range(2 * (repeats + 1)):  # one and two workers take turns; the first pair warms up
            others = [other] if repeat % 2 else []
            for num_batches in (2, 1):
                mixed = mixed_jobs(model, num_calls) * num_batches
                jobs = [replace(job, request_id=f"r{repeat}-{num_batches}-{i}") for i, job in enumerate(mixed)]
                times.append(asyncio.run(engine_s(model, jobs, 1, others=others)))
        del times[:4]
    elif what == "engine":
        for repeat in range(repeats + 1):  # the first warms up
            jobs = [replace(job, request_id=f"r{repeat}-{i}") for i, job in enumerate(mixed_jobs(model, num_calls))]
            times.append(asyncio.run(engine_s(model, jobs, threads)))
        del times[0]
    else:
        times = asyncio.run(first_step_of_eighth(model, repeats, num_calls, threads))
    return times


def timer(
    large: Path, dtype: str, repeats: int, num_calls: int, *, together: Sequence[str] = ()
) -> Callable[[str], list[float]]:
    """Returns what runs a part in a child of its own, and gives its times in seconds.

    Parts that are named in `together` run in one child, now: that spoils their times, and loads the model once.
    """
    known = in_child(",".join(together), large, dtype, repeats, num_calls) if together else {}
    return lambda part: known[part] if part in known else in_child(part, large, dtype, repeats, num_calls)[part]


def bench_engine(times_of: Callable[[str], list[float]], *, repeats: int, num_calls: int, num_pairs: int) -> None:
    """Prints throughput and admission latency of the engine."""
    ratios, steps = [], []
    for _ in range(num_pairs):  # bare and engine take turns, since the machine's speed drifts
        bare = statistics.median(times_of("bare"))
        engine = statistics.median(times_of("engine"))
        ratios.append(bare / engine)
        steps.append(bare / num_calls)
    step_s = statistics.median(steps)
    say(
        f"engine throughput / bare batched U-Net loop, 8 mixed jobs: {statistics.median(ratios):.3f} "
        f"(aim 0.97; {num_pairs} pairs of medians of {repeats}: {min(ratios):.3f} to {max(ratios):.3f}; "
        f"bare step {1e3 * step_s:.0f} ms)"
    )
    times = times_of("first")
    say(
        f"first step of the 8th job, in steps: mean {statistics.mean(times) / step_s:.2f}, "
        f"worst {max(times) / step_s:.2f} (aim 2; {len(times)} arrivals at random moments)"
    )


def bench_devices(times_of: Callable[[str], list[float]]) -> None:
    """Prints what a second worker adds, each with one thread."""
    times = times_of("devices")
    for what, own in (("16 mixed jobs, a batch for each; aim 1.8", times[::2]), ("8, a batch cut in two", times[1::2])):
        ratios = [one / two for one, two in zip(own[::2], own[1::2], strict=True)]
        say(
            f"two CPU workers / one, one thread each ({what}): {statistics.median(ratios):.2f} times as fast "
            f"({len(ratios)} pairs {min(ratios):.2f} to {max(ratios):.2f}; {own[0]:.2f} s against {own[1]:.2f} s)"
        )


def bench_loading(times_of: Callable[[str], list[float]]) -> None:
    """Prints what a model that is loaded costs the steps beside it."""
    answer = times_of("loading")
    num_quiet, num_beside = map(int, answer[:2])
    quiet, beside = answer[2 : 2 + num_quiet], answer[2 + num_quiet : 2 + num_quiet + num_beside]
    loads = answer[2 + num_quiet + num_beside :]
    median, worst = statistics.median(beside), max(beside)
    over = sum(step > 1.5 * median for step in beside)
    say(
        f"worst step while a model is loaded / their median: {worst / median:.2f} (aim 1.5; {over} of {num_beside} "
        f"above it; median {1e3 * median:.0f} ms; without a load: worst / median "
        f"{max(quiet) / statistics.median(quiet):.2f}, median {1e3 * statistics.median(quiet):.0f} ms, {num_quiet} "
        f"steps; {len(loads)} loads of {statistics.median(loads):.1f} s)"
    )


def one_process_s(model: Model, models: Models, request: Request, conditioning: Conditioning) -> float:
    """Times the same steps with both U-Nets and the decoder in this process, nothing in between."""
    manifest = models.manifest
    steps, cloud_steps = request.num_inference_steps or 0, request.cloud_steps or 0
    plan = model.plans.plan(request.scheduler or "", steps)
    side = (manifest.defaults.height // manifest.vae_scale_factor, manifest.defaults.width // manifest.vae_scale_factor)
    shape = (manifest.latent_channels, *side)
    assert conditioning.negative_prompt_embeds is not None
    pair = np.stack([conditioning.negative_prompt_embeds, conditioning.prompt_embeds])
    denoiser, g = model.denoiser, request.guidance_scale or 1.0
    embeds = torch.from_numpy(pair).to(denoiser.device, denoiser.dtype)

    def large(x: torch.Tensor, t: float) -> torch.Tensor:
        output = denoiser.predict(torch.stack([x, x]), torch.full((2,), t, device=x.device), Conditions(embeds))
        return output[0] + g * (output[1] - output[0])

    def small(x: np.ndarray, t: float) -> np.ndarray:
        return models.predict_noise(x.astype(np.float32), t, conditioning, guidance_scale=g)

    begin = time.perf_counter()
    with torch.inference_mode():
        state: list[Any] = initial_state(plan, torch.from_numpy(noise.initial_latents(1, 0, shape)).to(denoiser.device))
        for done in denoise(plan, state, large, _no_noise, stop=plan.first_call(cloud_steps)):
            state = done.state
    arrays = [array.cpu().numpy() for array in state]
    for advance in denoise(plan, arrays, small, _no_noise, start=plan.first_call(cloud_steps)):
        arrays = advance.state
    models.decode(arrays[0])
    return time.perf_counter() - begin


def bench_hybrid(
    model: Model, bundle_folder: Path, cloud_options: list[str], *, steps: int, k: int, repeats: int, settle_s: float
) -> None:
    """Prints hybrid over gRPC against one process, and what an edge step takes."""
    bundle = Bundle(bundle_folder, read_manifest(bundle_folder))
    models = Models(bundle_folder, bundle.manifest)
    request = Request(
        prompt=PROMPT, mode="hybrid", scheduler="dpmpp_2m", num_inference_steps=steps, cloud_steps=k,
        guidance_scale=4.0, seed=1, fallback=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name, running_cloud(cloud_options, Path(name) / "cloud.log") as (address, _):
        cloud = Cloud(address, cache=Cache(Path(name) / "cache"))
        wire, local, edge_step_s, conditioning = [], [], [], None
        for repeat in range(repeats + 1):
            time.sleep(settle_s)
            begin = time.perf_counter()
            for event in generate(
                resolve(replace(request, request_id=f"bench{repeat}", seed=1 + repeat), bundle.manifest),
                bundle,
                models,
                cloud,
            ):
                if isinstance(event, CloudStarted):
                    conditioning = event.conditioning or conditioning
                elif isinstance(event, StepDone) and event.place == "edge":
                    edge_step_s.append(event.elapsed_s)
                elif isinstance(event, EdgeFinished):
                    result = event.result
            elapsed = time.perf_counter() - begin
            conditioning = conditioning or result.conditioning
            assert conditioning is not None
            assert result.actual_cloud_steps == k
            time.sleep(settle_s)
            alone = one_process_s(model, models, request, conditioning)
            if repeat:  # the first warms both up
                wire.append(elapsed)
                local.append(alone)
        cloud.close()
        kept_s = reused_over_grpc_s(address, model.info.default_size, 20 * repeats, k)
    say_reuse("over gRPC", kept_s)
    ratios = [a / b for a, b in zip(wire, local, strict=True)]
    say(
        f"hybrid over gRPC / the same steps in one process: {statistics.median(ratios):.3f} "
        f"(aim 1.02; {repeats} pairs {min(ratios):.3f} to {max(ratios):.3f}; {k} + {steps - k} steps, "
        f"{statistics.median(wire):.2f} s against {statistics.median(local):.2f} s; the text is encoded in neither)"
    )
    say(f"edge step, guidance, ONNX Runtime: {1e3 * statistics.median(edge_step_s):.0f} ms")


async def reused_in_engine_s(model: Model, repeats: int, num_calls: int) -> list[float]:
    """Times from submitting a job whose hand-off is kept to the event that has it."""
    engine = Engine(FixedModels({model.info.id: model.denoiser}), num_threads=1, prefix_cache_bytes=64 * 2**20)
    engine.start()
    request, times = mixed_jobs(model, num_calls)[0], []
    request = replace(request, prefix=prefix_digest(request, request.plan.digest()))
    for repeat in range(repeats + 1):
        box, begin = EventBuffer(), time.perf_counter()
        engine.submit(replace(request, request_id=f"reuse-{repeat}"), box)
        await _drain(box, lambda begin=begin: times.append(time.perf_counter() - begin))
    engine.stop()
    return times[1:]


def reused_over_grpc_s(address: str, side: int, repeats: int, num_calls: int) -> list[float]:
    """Times from sending a request whose hand-off is kept to the message that has it, both on this machine."""
    request, times = request_of(num_calls, side, steps=max(4, num_calls)), []
    request.request_id = ""  # each is a job of its own
    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for message in stub.Denoise(request):
            if message.HasField("state") and message.state.is_handoff:
                times.append(time.perf_counter() - begin)
    channel.close()
    return times[1:]


def say_reuse(where: str, times: Sequence[float]) -> None:
    """Prints how soon a request that was made before is answered."""
    median_ms, worst_ms = 1e3 * statistics.median(times), 1e3 * max(times)
    say(f"a kept hand-off, {where}: {median_ms:.2f} ms, worst {worst_ms:.2f} ms (aim 5; {len(times)} times)")


def bench_wire(folder: Path, codecs: Sequence[str]) -> None:
    """Prints the bytes of each kind of message, read off real messages of a real server with SD 1.x shapes."""
    say("bytes on the wire: 512x512, DPM-Solver++ 2M, 25 steps, guidance, empty negative known, hand-off only;")
    say("'every' is what the edge asks for, to be able to take over: a state after each of 8 cloud steps")
    say("  codec  prompt    request     plan   embeds    state    other      all      aim")
    aims = {("fp16", "new"): "190 KiB", ("int8", "new"): "100 KiB", ("int8", "known"): "40 KiB"}
    for row in measure(folder, codecs):
        sizes = "".join(f"{row[key]:9d}" for key in ("request", "plan", "embeds", "state", "other", "all"))
        say(f"  {row['codec']:6s} {row['prompt']:6s} {sizes}  {aims.get((row['codec'], row['prompt']), ''):>7s}")


def bench_codec(model: Model, bundle_folder: Path, *, steps: int, k: int, num_images: int) -> None:
    """Prints what fp16 and int8, of embeddings and state, cost in latents and in the final image, against fp32."""
    manifest = read_manifest(bundle_folder)
    models = Models(bundle_folder, manifest)
    plan = model.plans.plan("dpmpp_2m", steps)
    call, guidance = plan.first_call(k), manifest.defaults.guidance_scale
    cells = (
        manifest.defaults.height // manifest.vae_scale_factor,
        manifest.defaults.width // manifest.vae_scale_factor,
    )
    names = ("fox", "donut", "rocket", "cat", "pizza", "car", "tree", "moon")
    errors: dict[str, list[tuple[float, float, float]]] = {"fp16": [], "int8": []}
    for seed in range(num_images):
        text = f"a {names[seed % 8]} to the left of a {names[(seed + 3) % 8]} on a blue background"
        pair = np.stack([model.denoiser.encode(words, TextOptions()).embeds for words in ("", text)])
        rows = torch.from_numpy(pair).to(model.denoiser.device, model.denoiser.dtype)

        def large(x: np.ndarray, t: float, rows: torch.Tensor = rows) -> np.ndarray:
            sample = torch.from_numpy(np.stack([x, x])).to(rows.device)
            with torch.inference_mode():
                times = torch.full((2,), t, device=rows.device)
                output = model.denoiser.predict(sample, times, Conditions(rows)).cpu().numpy()
            return np.asarray(output[0] + np.float32(guidance) * (output[1] - output[0]))

        start = initial_state(plan, noise.initial_latents(seed, 0, (manifest.latent_channels, *cells)))
        *_, handoff = denoise(plan, start, large, _no_noise, stop=call)
        finished = {}
        for name, encoding in codec.ENCODINGS.items():
            through = [codec.decode_tensor(codec.encode_tensor(array, encoding)) for array in (*handoff.state, *pair)]
            conditioning = Conditioning(prompt_embeds=through[-1], negative_prompt_embeds=through[-2])

            def small(x: np.ndarray, t: float, conditioning: Conditioning = conditioning) -> np.ndarray:
                return models.predict_noise(x.astype(np.float32), t, conditioning, guidance_scale=guidance)

            *_, done = denoise(plan, through[:-2], small, _no_noise, start=call)
            state_error = max(np.abs(a - b).max() for a, b in zip(through, handoff.state, strict=False))
            finished[name] = (done.state[0], models.decode(done.state[0]), float(state_error))
        exact, reference, _ = finished["fp32"]
        for name in errors:
            latents, image, state_error = finished[name]
            mse = float(np.mean((image - reference) ** 2))
            psnr = 10 * np.log10(4.0 / mse) if mse > 0 else float("inf")  # values span 2
            errors[name].append((state_error, float(np.sqrt(np.mean((latents - exact) ** 2))), psnr))
    say(f"codec of state and embeddings, against fp32 ({num_images} images, {k} + {steps - k} steps, DPM-Solver++ 2M):")
    for name, rows_of_errors in errors.items():
        state, final, psnrs = zip(*rows_of_errors, strict=True)
        say(
            f"  {name}: largest error of the state {max(state):.1e}; of the final latents rms "
            f"{statistics.mean(final):.1e}; "
            f"image PSNR mean {statistics.mean(psnrs):.1f} dB, worst {min(psnrs):.1f} dB"
        )


def _no_noise(call: int) -> Any:
    raise AssertionError(f"call {call} draws noise; DPM-Solver++ 2M does not")


def bench_edge_memory(bundle_folder: Path, *options: str) -> None:
    """Prints the peak memory of an edge process that draws one image alone."""
    code = (  # runs the command in this process, and then says what it took
        "import atexit, re, runpy, sys\n"
        "from pathlib import Path\n"
        "status = Path('/proc/self/status')\n"
        "atexit.register(lambda: print(int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1024))\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for mode in ("normal", "low"):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "-c", code, BIN / "hybridsd", "generate", PROMPT, "--mode", "edge", "--seed", "1"),
                *("--bundle", bundle_folder, "--quiet", "--output", Path(folder) / "image.png", *options),
                *(["--low-memory"] if mode == "low" else []),
            ]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, env=ENVIRONMENT)
        say(f"edge process, one image alone, {mode} memory mode: peak {float(done.stdout):.0f} MiB")


def bench_start(bundle_folder: Path, repeats: int) -> None:
    """Prints what a command costs before it does anything: CPU seconds of its process, median."""
    commands = {
        "hybridsd --version": ["--version"],
        "hybridsd probe, a health check": ["probe", "--gateway", "http://127.0.0.1:9"],
        "hybridsd generate, up to its first step": ["generate", PROMPT, "--dry-run", "--bundle", str(bundle_folder)],
    }
    for name, words in commands.items():
        taken = []
        for _ in range(repeats):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([BIN / "hybridsd", *words], capture_output=True, check=False, env=ENVIRONMENT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        say(f"start of {name}: {statistics.median(taken):.2f} CPU s")


def main() -> None:
    """Runs the benchmarks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="full-size shapes with random weights: minutes, 10 GiB")
    parser.add_argument("--family", type=Path, default=DEMO, help="folder with large/ and edge/")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="the smallest size of everything: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=12, help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    if options.child:
        say(json.dumps(child(options.child, options.family / "large", options.dtype, options.repeats, options.calls)))
        return
    family, steps, k, calls, repeats, pairs, images = options.family, 25, 8, 12, options.repeats, 3, 8
    if options.smoke:
        steps, k, calls, repeats, pairs, images = 4, 1, 2, 1, 1, 1  # the bundle has plans of 4 steps
    settle_s = 0.0 if options.smoke else SETTLE_S
    with tempfile.TemporaryDirectory() as folder:
        if options.full:
            from tests.support.full_size import write_full_size

            say("writing full-size models with random weights ...")
            family, steps, k, calls = write_full_size(Path(folder)), 6, 2, 2
        placement = place(dtype=options.dtype)
        say(f"machine: {machine()}")
        say(f"cloud: {placement.device} ({placement.device_reason}), {placement.dtype} ({placement.dtype_reason})")
        model = load_model(f"bench={family / 'large'}", placement)
        edge = read_manifest(family / "edge")
        say(
            f"models: large U-Net {model.info.num_parameters:,}, small U-Net {edge.num_parameters['unet']:,} parameters"
        )
        wanted = options.only or PARTS
        in_children = [*ENGINE_PARTS] * ("engine" in wanted) + [part for part in CHILD_PARTS if part in wanted]
        times_of = timer(family / "large", options.dtype, repeats, calls, together=in_children if options.smoke else ())
        if "engine" in wanted:
            bench_engine(times_of, repeats=repeats, num_calls=calls, num_pairs=pairs)
        if "devices" in wanted:
            bench_devices(times_of)
        if "loading" in wanted:
            bench_loading(times_of)
        if "hybrid" in wanted:
            cloud = ["--model", f"bench={family / 'large'}", "--dtype", options.dtype]
            bench_hybrid(model, family / "edge", cloud, steps=steps, k=k, repeats=repeats, settle_s=settle_s)
        if "reuse" in wanted:
            say_reuse("in the engine", asyncio.run(reused_in_engine_s(model, 20 * repeats, calls)))
        if "wire" in wanted:
            bench_wire(Path(folder), codecs=("int8",) if options.smoke else tuple(codec.ENCODINGS))
        if "codec" in wanted and not options.full:  # random weights say nothing about errors
            bench_codec(model, family / "edge", steps=steps, k=k, num_images=images)
        if "start" in wanted:
            bench_start(family / "edge", repeats)
        if "memory" in wanted:
            bench_edge_memory(family / "edge", *(("--steps", str(steps)) if options.smoke else ()))


if __name__ == "__main__":
    main()
