"""The ranges that every interface checks and every document names: each in one place.

Both ends are included unless said otherwise. Sizes and steps have narrower limits by model; see `GetCapabilities`.
"""

MIN_GUIDANCE, MAX_GUIDANCE = 1.0, 30.0
"""guidance_scale; 1 is none."""
MAX_GUIDANCE_RESCALE = 1.0
"""guidance_rescale, from 0, which is none."""
MAX_STEPS = 1000
"""num_inference_steps, from 1."""
MAX_SCHEDULER_CHARS = 1024
"""Of the name of a scheduler with its modifiers, timesteps or noise levels of one's own included."""
MAX_CALLS = 4 * MAX_STEPS
"""Calls of the U-Net in one plan."""
MAX_SIZE = 4096
"""Width and height in pixels."""
MAX_SEED = 2**53 - 1
"""An integer that JavaScript can hold."""
MAX_IMAGE_INDEX = 0xFFFF
MAX_PROMPT_CHARS = 4000
"""Of a prompt, and of a negative prompt."""
MAX_CHUNKS = 4
"""Chunks of one context length that a text may take; tokens beyond them are dropped."""
MAX_EVERY = 1000
"""Of `state_every` and `preview_every`, from 0."""
MAX_STATE_BYTES = 2**31 - 1
"""Of `max_state_bytes`, from 0, which is no limit."""
MAX_FOLLOWED_VALUES = 2**23
"""Calls that a state in few bytes leads over, times values of the latents: 128 calls at 1024x1024, some seconds."""
MAX_LORAS = 8
"""Adapters of one image."""
MIN_LORA_WEIGHT, MAX_LORA_WEIGHT = -4.0, 4.0
MAX_DEADLINE_S = 86_400
"""Seconds that the cloud's part may be given; more than 0."""
MAX_REQUEST_BYTES = 8 << 20
"""Of a gRPC message of a caller: a state of the largest size that is sent out, and what else a request may hold."""
MAX_REUSED_CALLS = 3
"""Calls that may be taken over from an image of another text: what is in the image is still open then."""
