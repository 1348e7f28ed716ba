"""One ONNX file in a role: its inputs are checked by name when it is opened, its arrays converted when it runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.inference.session import ProviderFailed, Session
from hybridsd.errors import Reason

_SDXL = {"text_embeds", "time_ids"}
_PLAIN = {"sample", "timestep", "encoder_hidden_states"}
_EMBEDDED = _PLAIN | {"guidance_scale"}
_FUSED = {"sample", "timestep", "prompt_embeds", "negative_prompt_embeds", "guidance_scale"}
_UNETS = tuple(
    frozenset(names)
    for names in (
        _PLAIN, _EMBEDDED, _FUSED, _PLAIN | _SDXL, _EMBEDDED | _SDXL, _FUSED | _SDXL | {"negative_text_embeds"},
    )
)  # fmt: skip
INPUTS: Mapping[str, tuple[frozenset[str], ...]] = {
    "unet": _UNETS,
    "unet_high_noise": _UNETS,
    "text_encoder": (frozenset({"input_ids"}),),
    "text_encoder_2": (frozenset({"input_ids"}),),
    "vae_decoder": (frozenset({"latents"}),),
    "vae_encoder": (frozenset({"image"}),),
    "safety_checker": (frozenset({"clip_input"}),),
}  # fmt: skip
"""Which inputs a file may have, by role."""


class Network:
    """A loaded file.

    Args:
        session: The file, loaded.
        role: One of `INPUTS`.
        what: The file in words, for messages.

    Raises:
        InvalidRequest: MANIFEST_INVALID when its inputs are not those of the role.
    """

    def __init__(self, session: Session, role: str, what: str) -> None:
        self.inputs = frozenset(session.inputs)
        if self.inputs not in INPUTS[role]:
            allowed = " or ".join(str(sorted(names)) for names in INPUTS[role])
            raise Reason.MANIFEST_INVALID.error(
                f"{what} has inputs {sorted(self.inputs)}; it must have {allowed}: export the bundle again",
                field="bundle",
            )
        self.session = session

    def __call__(self, **arrays: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Runs the file.

        Args:
            **arrays: By input, with a batch axis; of any dtype, since files in half precision take float16.

        Returns:
            Every output by its name, float32.

        Raises:
            InternalError: When the library that runs it refuses, with what it said.
        """
        inputs = self.session.inputs
        feeds = {name: np.ascontiguousarray(array, dtype=inputs[name].dtype) for name, array in arrays.items()}
        try:
            results = self.session.run(feeds)
        except ProviderFailed as error:
            raise Reason.INTERNAL.error(
                f"a model failed to run: {error}; run `hybridsd doctor`, or change `provider`"
            ) from error
        return {
            name: result.astype(np.float32, copy=False)
            for name, result in zip(self.session.outputs, results, strict=True)
        }

    def single(self, **arrays: NDArray[Any]) -> NDArray[np.float32]:
        """Runs a file of one output, and returns that; see `__call__`."""
        (result,) = self(**arrays).values()
        return result
