"""What the fields of a request are called on the command line: `num_inference_steps` is --steps there."""

from hybridsd.errors import name_fields

_OPTIONS = {
    "cors_origins": "--cors-origin",
    "allowed_hosts": "--allowed-host",
    "webhook_hosts": "--webhook-host",
    "call_skipping": "--cloud-skip",
    "conditioning": "--load-embeddings",
    "csv_file": "--csv",
    "deadline_s": "--deadline",
    "edge_models": "--edge-model",
    "edge_skipping": "--edge-skip",
    "extrapolation": "A",
    "initial_latents": "--load-latents",
    "loras": "--lora",
    "num_inference_steps": "--steps",
    "resume": "--load-latents",
    "safety": "--safety-checker",
    "skipped_calls": "SKIP",
    "token": "HYBRIDSD_EDGE_TOKEN",
    "tolerance": "TOLERANCE",
    "warm_up_calls": "WARMUP",
}
"""Where it is not the field's own name."""


def option(field: str) -> str:
    """Returns the option of a field."""
    return _OPTIONS.get(field) or f"--{field.replace('_', '-')}"


def in_options(message: str) -> str:
    """Returns a message with options for the fields that it names."""
    return name_fields(message, option)
