"""What this device, its models and the cloud can do now, as one document."""

import importlib.metadata
from typing import Any

from edge_client.web.dependencies import Gateway
from edge_client.web.jobs.check_cloud import size_range
from edge_client.web.schemas.native import MAX_IMAGES
from hybridsd import schedulers
from hybridsd.limits import MAX_GUIDANCE, MAX_PROMPT_CHARS, MAX_SEED, MAX_SIZE, MAX_STEPS, MIN_GUIDANCE


async def capabilities(gateway: Gateway) -> dict[str, Any]:
    """Returns a `schemas.native.Capabilities`."""
    manifest, defaults = gateway.bundle.manifest, gateway.bundle.manifest.defaults
    found, message = await gateway.watch.poll()
    least, largest = size_range(manifest, found)
    offline = gateway.bundle.least_cloud_steps()
    return {
        "version": importlib.metadata.version("hybridsd"),
        "edge": {
            "model": manifest.name,
            "max_timestep": manifest.max_timestep,
            "has_high_noise_unet": "unet_high_noise" in manifest.files,
            "latent_space": manifest.latent_space,
            "provider": gateway.models.choice.describe(),
            "size_multiple": manifest.size_multiple,
            "sizes": list(manifest.sizes),
            "max_size": MAX_SIZE,
            "offline": [
                {"scheduler": name, "steps": list(least), "least_cloud_steps": list(least.values())}
                for name, least in offline.items()
            ],
            "guidance": manifest.guidance,
            "has_image_encoder": "vae_encoder" in manifest.files,
            "has_safety_checker": gateway.models.has_safety_checker,
        },
        "cloud": {
            "configured": gateway.cloud is not None,
            "reachable": found is not None,
            "target": "" if gateway.cloud is None else gateway.cloud.target,
            "message": message,
            "clouds": gateway.watch.each,
            "models": [
                {
                    "id": model.id, "guidance": model.guidance, "loras": list(model.loras),
                    "schedulers": list(model.schedulers), "state": model.state,
                }
                for model in gateway.compatible_models(found)
            ],
            "min_size": least,
            "max_size": largest,
            "num_running": found.num_running if found else 0,
            "num_queued": found.num_queued if found else 0,
            "step_s": found.call_s if found else 0.0,
            "dollars_per_hour": gateway.cloud_dollars_per_hour,
        },
        "defaults": {
            "scheduler": schedulers.find(defaults.scheduler).name,
            "num_inference_steps": defaults.num_inference_steps,
            "cloud_steps": defaults.cloud_steps,
            "guidance_scale": defaults.guidance_scale,
            "width": defaults.width,
            "height": defaults.height,
        },
        "schedulers": [
            {"name": spec.name, "label": spec.label, "modifiers": list(spec.modifiers)}
            for spec in schedulers.SCHEDULERS
        ],
        "limits": {
            "max_prompt_chars": MAX_PROMPT_CHARS, "max_n": MAX_IMAGES, "max_steps": MAX_STEPS,
            "max_seed": MAX_SEED, "min_guidance": MIN_GUIDANCE, "max_guidance": MAX_GUIDANCE,
            "max_body_bytes": gateway.max_body_bytes, "max_queue": gateway.queue.max_waiting,
        },
        "quality": [
            {
                "metric": point.metric, "num_inference_steps": point.num_inference_steps,
                "cloud_steps": point.cloud_steps, "value": point.value, "low": point.low, "high": point.high,
                "samples": point.samples, "seed": point.seed,
            }
            for point in manifest.quality
        ],
        "queue": gateway.queue.load,
    }  # fmt: skip
