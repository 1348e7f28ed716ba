"""What a cache of latents saves, at SD 1.4's shapes: `python -m tests.benchmarks.bench_cache [--size N] [--images N]`.

Counts the multiply-accumulates of a training step with the encoders and without, and times one image that is encoded
and one that is read from a cache, and what both take on disk. Weights are random. Writes into a temporary folder.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hybridsd import aspect_buckets
from tests.benchmarks.common import machine, say
from training.core.conditioning import posterior
from training.cost.cost import WHOLE, costs, unet_inputs
from training.data.cache import Cache, Identity, Views, Writer, digest
from training.data.transforms import Framing, View
from training.models import shapes

GIGA = 1e9
TOKENS = 77


def macs(module: Any, inputs: Any) -> float:
    """Of one call, in billions."""
    return costs(module, inputs)[WHOLE].all_macs / GIGA


def seconds(run: Callable[[], Any], times: int) -> float:
    """Of one call, the fastest of some."""
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        spent.append(time.perf_counter() - started)
    return min(spent)


def materialised(module: Any) -> Any:
    """Gives a network of the meta device random weights."""
    module = module.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return module


def report(size: int, images: int) -> None:
    """Prints the table."""
    vae, text, large, small = shapes.vae(), shapes.text_encoder(), shapes.sd14(), shapes.hybrid_224m()
    latent = size // 8
    picture = torch.zeros(1, 3, size, size, device="meta")
    encode = macs(vae.encoder, {"sample": picture})
    embed = macs(text, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long, device="meta")})
    calls = [macs(unet, unet_inputs(unet.config, batch=1, height=latent, width=latent)) for unet in (large, small)]
    # forward, backward (twice), forward again (gradient checkpointing)
    distil, lcm = calls[0] + 4 * calls[1], (2 + 4 + 1) * calls[0]
    for name, step in (("sd-distill, 224M from SD 1.4", distil), ("sd-lcm of SD 1.4", lcm)):
        share = (encode + embed) / (step + encode + embed)
        say(f"{name}: {step:,.0f} GMAC a sample, and {encode:,.0f} + {embed:,.0f} of VAE and text: {share:.0%} saved")

    vae, text = materialised(vae), materialised(text)
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, size, size)).astype(np.float32))
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        mean, std = posterior(vae, pixels)
        hidden = text(input_ids=ids).last_hidden_state
        encoding = seconds(lambda: posterior(vae, pixels), images)
        embedding = seconds(lambda: text(input_ids=ids), images)
        file = Path(folder) / "image.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        ).save(file, quality=95)
        content, view = file.read_bytes(), View(x=0.5, y=0.5, mirrored=True)
        out = np.empty((3, size, size), dtype=np.float32)
        decoding = seconds(lambda: Framing(resolution=size).read(content, view, out), images)
        identity, views = Identity(vae="", text=""), Views(crop="center", flip=True, crops=1, seed=None)
        where = Path(folder) / "cache"
        writer = Writer(where, identity)
        both = torch.cat([mean, std]).numpy()
        square: aspect_buckets.Size = (size, size)
        for mirrored in (False, True):
            name = views.name(digest(content), square, epoch=0, mirrored=mirrored)
            writer.add_latents(name, both, (size, size, 0, 0, size, size))
        of_images = writer.waiting_bytes
        writer.add_embeds("a caption", [hidden[0].numpy()])
        of_captions = writer.waiting_bytes - of_images
        writer.flush()
        cache = Cache(where, identity)

        def read() -> None:
            cache.latents(views.name(digest(content), square, epoch=0, mirrored=True))
            cache.embeds("a caption")

        reading = seconds(read, images)
    say(f"decoding {1e3 * decoding:.1f} ms, VAE {1e3 * encoding:,.0f} ms, text {1e3 * embedding:,.0f} ms")
    say(f"from the cache {1e3 * reading:.2f} ms, with the digest of the file")
    say(f"on disk {of_images / 1024:.0f} KiB an image, as it is and mirrored, {of_captions / 1024:.0f} KiB a caption")


def main() -> None:
    """Parses the options and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="Width and height in pixels.")
    parser.add_argument("--images", type=int, default=5, help="How often each is timed.")
    options = parser.parse_args()
    say(machine())
    report(options.size, options.images)


if __name__ == "__main__":
    main()
