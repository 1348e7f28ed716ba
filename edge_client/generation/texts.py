"""Texts that this device encodes: when it needs them, or beside the cloud's steps where it has the same encoders."""

import contextlib
import threading
import time
from concurrent.futures import Future

from edge_client.generation.energy import Account, Tally
from edge_client.generation.trajectory import MadeTexts, Trajectory
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd import text_identity, tracing
from hybridsd.errors import HybridSDError


def encode_text(trajectory: Trajectory, models: Models, *, negative: bool) -> None:
    """Encodes the text here, unless the trajectory has its embeddings; waits for a thread that makes them already.

    Args:
        trajectory: Gets them.
        models: The edge's.
        negative: Whether unconditional embeddings are needed.
    """
    if trajectory.making_texts is not None:
        making, trajectory.making_texts = trajectory.making_texts, None
        trajectory.take_texts(making.result())
    held = trajectory.conditioning
    if held is not None and (not negative or held.negative_prompt_embeds is not None):
        return
    request = trajectory.resolved.request
    made = _make(request, models, trajectory.tally.account, negative=negative)
    trajectory.conditioning = None
    trajectory.take_texts(made)


class OwnTexts:
    """The embeddings of an image whose cloud has the text encoders of this device, and sends samples only.

    Args:
        trajectory: Of the image.
        models: The edge's.
    """

    def __init__(self, trajectory: Trajectory, models: Models) -> None:
        self._trajectory, self._models = trajectory, models

    def begin(self) -> None:
        """Lets a thread encode the text, if the cloud has sent samples and nobody has encoded it yet."""
        trajectory, samples = self._trajectory, self._trajectory.samples
        if samples is None or trajectory.conditioning is not None or trajectory.making_texts is not None:
            return
        making: Future[MadeTexts] = Future()
        request, account = trajectory.resolved.request, trajectory.tally.account

        def run() -> None:
            try:
                making.set_result(_make(request, self._models, account, negative=samples.negative_prompt is not None))
            except BaseException as error:  # raised where the result is asked for
                making.set_exception(error)
            if self._models.low_memory:  # the encoder has taken the place of the U-Net
                with contextlib.suppress(HybridSDError):
                    self._models.warm_up()

        trajectory.making_texts = making
        threading.Thread(target=run, name="hybridsd-text").start()  # no daemon: ending inside ONNX Runtime aborts

    def distance_if_off(self, *, wait: bool) -> float | None:
        """Compares with the samples, once; embeddings that differ are given up.

        Args:
            wait: Waits for the thread; else looks only if it is done.

        Returns:
            How far they are from the cloud's, where that is more than `text_identity.TOLERANCE`; None where it is not,
            or nothing is to be compared.
        """
        trajectory, samples = self._trajectory, self._trajectory.samples
        making = trajectory.making_texts
        if samples is None or (making is not None and not (wait or making.done())):
            return None
        trajectory.samples = None
        try:
            encode_text(trajectory, self._models, negative=samples.negative_prompt is not None)
        except HybridSDError:  # the cloud's will do
            return float("inf")
        held = trajectory.conditioning
        assert held is not None
        found = text_identity.distance(samples.prompt, held.prompt_embeds, held.pooled_prompt_embeds)
        if samples.negative_prompt is not None and held.negative_prompt_embeds is not None:
            negative = text_identity.distance(
                samples.negative_prompt, held.negative_prompt_embeds, held.negative_pooled_prompt_embeds
            )
            found = max(found, negative)
        if found <= text_identity.TOLERANCE:
            return None
        if trajectory.embeddings_from == "edge":
            trajectory.conditioning, trajectory.embeddings_from = None, ""
        return found


def _make(request: Request, models: Models, account: Account, *, negative: bool) -> MadeTexts:
    """Encodes the texts of a request."""
    begin, tally = time.perf_counter(), Tally(account=account)

    def count() -> None:
        for role in ("text_encoder", "text_encoder_2"):
            if role in models.manifest.files:
                tally.count(models.manifest, role)

    with tracing.start("encode text", request.trace), tally.measuring():
        conditioning, num_dropped_tokens = models.encode_pair(
            request.prompt, request.negative_prompt if negative else None, request.text_options, on_encode=count
        )
    elapsed_s = time.perf_counter() - begin
    return MadeTexts(conditioning=conditioning, num_dropped_tokens=num_dropped_tokens, elapsed_s=elapsed_s, tally=tally)
