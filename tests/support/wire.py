"""Counts the bytes of each kind of message, on real messages of a real server with SD 1.x shapes.

Used by `make bench` and by a test that keeps the sizes within the aims. Sizes do not depend on the weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc

from deploy.run_demo import running_cloud
from hybridsd import codec
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.support.patience import HANG_S
from tests.support.tiny_pipeline import write_tiny_pipeline

STEPS, HANDOFF = 25, 2


def measure(folder: Path, codecs: Sequence[str] = tuple(codec.ENCODINGS)) -> Iterator[dict[str, str | int]]:
    """Yields bytes by kind of message for each codec, at 512x512 with DPM-Solver++ 2M and guidance.

    The row "new" has the hand-off state only, the empty negative prompt known; "known" also knows prompt and plan;
    "every" is "known" with a state after each of 8 cloud steps; "own" is "new", the plan known, to an edge that has the
    cloud's text encoder.
    """
    model = write_tiny_pipeline(folder / "sd1-shapes", context_length=77, embed_dim=768, size=512)
    with running_cloud(["--model", f"sd={model}", "--dtype", "fp32", "--prefix-cache", "0"], folder / "wire.log") as (
        address,
        _,
    ):
        channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
        for name in codecs:
            encoding = codec.ENCODINGS[name]
            first = exchange(stub, encoding, [])
            negative, prompt, plan = (first[1][key] for key in ("negative", "prompt", "plan"))
            yield {"codec": name, "prompt": "new", **exchange(stub, encoding, [negative])[0]}
            known = [negative, prompt, plan]
            models = stub.GetCapabilities(pb.GetCapabilitiesRequest()).models
            encoder = models[0].text_encoder_digest
            yield {"codec": name, "prompt": "own", **exchange(stub, encoding, [plan], text_encoder_digest=encoder)[0]}
            yield {"codec": name, "prompt": "known", **exchange(stub, encoding, known)[0]}
            yield {"codec": name, "prompt": "every", **exchange(stub, encoding, known, state_every=1, handoff=8)[0]}
        channel.close()


def exchange(
    stub: denoising_service_pb2_grpc.DenoisingServiceStub,
    encoding: int,
    known: list[bytes],
    *,
    state_every: int = 0,
    handoff: int = HANDOFF,
    text_encoder_digest: bytes = b"",
) -> tuple[dict[str, int], dict[str, bytes]]:
    """Runs one request; returns bytes by kind, and the digests of what it brought."""
    request = pb.DenoiseRequest(
        text=pb.TextConditioning(prompt="a photograph of an astronaut riding a horse"),
        guidance_scale=7.5,
        seed=1,
        scheduler=pb.SchedulerSpec(name="dpmpp_2m", num_inference_steps=STEPS),
        handoff_step=handoff,
        state_every=state_every,
        encoding=encoding,  # type: ignore[arg-type]  # an int is what mypy-protobuf's own values are
        known_digests=known,
        text_encoder_digest=text_encoder_digest,
    )
    sizes = dict.fromkeys(("request", "plan", "embeds", "state", "other"), 0)
    sizes["request"] = request.ByteSize()
    digests: dict[str, bytes] = {}
    for response in stub.Denoise(request, timeout=HANG_S):
        kind = response.WhichOneof("event")
        size = response.ByteSize()
        if kind == "started":
            started = response.started
            sizes["plan"] += started.plan.ByteSize()
            texts = (started.prompt, started.negative_prompt)
            embeds = sum(text.embeds.ByteSize() + 4 * len(text.sample) for text in texts)
            sizes["embeds"] += embeds
            sizes["other"] += size - started.plan.ByteSize() - embeds
            digests = {
                "plan": started.plan_digest,
                "prompt": started.prompt.digest,
                "negative": started.negative_prompt.digest,
            }
        else:
            sizes["state" if kind == "state" else "other"] += size
    return {**sizes, "all": sum(sizes.values())}, digests
