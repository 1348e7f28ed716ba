"""Reads the texts of jobs, and makes their first states. For one thread."""

import time
from collections.abc import Callable, Hashable, Mapping

import structlog

from cloud_server.engine import step
from cloud_server.engine.job import Job
from cloud_server.engine.near import Feature, text_feature
from cloud_server.engine.request import Stage
from cloud_server.engine.step import Texts, Trajectory
from cloud_server.models.denoiser import Denoiser, Encoded, TextCache
from cloud_server.models.devices import beside

log = structlog.get_logger()


class TextReader:
    """The encoded texts of all models."""

    def __init__(
        self,
        on_lookup: Callable[[bool], None],
        content: Callable[[str], Hashable] = lambda _model: None,
        on_feature: Callable[[Job, Feature], None] = lambda _job, _feature: None,
    ) -> None:
        """Takes who hears of what.

        Args:
            on_lookup: Hears of each text that is asked for whether it was held.
            content: Says what a model's content is; see `ServedModels.content`.
            on_feature: Hears what the text of a job that may begin with a state of a near one is compared by, before it
                begins.
        """
        self._on_lookup, self._content, self._on_feature = on_lookup, content, on_feature
        self._caches: dict[str, tuple[Hashable, TextCache]] = {}

    def prepare(self, job: Job, denoisers: Mapping[str, Denoiser]) -> Trajectory:
        """Encodes all texts of a job, unless it has begun before, and takes it to a device.

        Args:
            job: The job.
            denoisers: The models that it needs, on one device.

        Raises:
            torch.AcceleratorError: If the device is lost to this process.
        """
        started_s = time.monotonic()
        with beside(next(iter(denoisers.values())).device):
            if not job.texts:
                job.texts = tuple(self._encode(job, denoisers[stage.model], stage) for stage in job.request.stages)
            if job.request.approximate_reuse is not None and job.feature is None and job.checkpoint is None:
                model = job.request.model
                empty = self._cache(model).encode(denoisers[model], "")
                self._on_feature(job, text_feature(job.texts[0][0], empty))
            trajectory = step.begin(denoisers, job.request, job.texts, job.checkpoint)
        log.debug("job_prepared", request_id=job.request.request_id, elapsed_ms=1e3 * (time.monotonic() - started_s))
        return trajectory

    def _cache(self, model: str) -> TextCache:
        """Returns the texts of a model, as it is now."""
        content = self._content(model)
        held = self._caches.get(model)
        if held is None or held[0] != content:
            self._caches = {  # but for those of models that were unloaded
                name: cache
                for name, cache in self._caches.items()
                if cache[0] is None or self._content(name) is not None
            }
            held = self._caches[model] = (content, TextCache(on_lookup=self._on_lookup))
        return held[1]

    def _encode(self, job: Job, denoiser: Denoiser, stage: Stage) -> Texts:
        """Returns prompt and, where the stage's model takes it, negative prompt, in one number of chunks."""
        request = job.request
        cache = self._cache(stage.model)
        given = [request.prompt]
        if step.is_guided(denoiser, stage.guidance_scale) and request.negative_prompt is not None:
            given.append(request.negative_prompt)
        spent_s = cache.spent_s

        def encode(num_chunks: int | None) -> list[Encoded]:
            return [
                cache.encode(denoiser, text, request.text_options, request.loras, num_chunks)
                if isinstance(text, str)
                else text
                for text in given
            ]

        encoded = encode(None)
        lengths = {len(one.embeds) for one in encoded}
        if len(lengths) > 1:
            shortest = len(cache.encode(denoiser, "").embeds)  # one chunk
            encoded = encode(max(lengths) // shortest)
        job.text_s += cache.spent_s - spent_s
        return encoded[0], encoded[1] if len(encoded) > 1 else None
