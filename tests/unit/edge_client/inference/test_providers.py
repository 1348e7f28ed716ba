"""What runs the models is chosen with a reason, and held to what the CPU computes before it is trusted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.inference import providers
from edge_client.inference import session as runtimes
from edge_client.inference.models import Models
from edge_client.types import Conditioning
from hybridsd.errors import InvalidRequest
from tests.support.tiny_bundle import CHANNELS, CONTEXT_LENGTH, EMBED_DIM

RNG = np.random.default_rng(9)
LATENTS = RNG.normal(size=(CHANNELS, 6, 4)).astype(np.float32)
EMBEDS = RNG.normal(size=(2, CONTEXT_LENGTH, EMBED_DIM)).astype(np.float32)
GIVEN = Conditioning(prompt_embeds=EMBEDS[0], negative_prompt_embeds=EMBEDS[1])


class Wrong:
    """A provider whose results are off by half."""

    def __init__(self, session: runtimes.Session) -> None:
        self._session, self.inputs, self.outputs = session, session.inputs, session.outputs

    def run(self, feeds: Any) -> list[Any]:
        return [1.5 * array for array in self._session.run(feeds)]


@pytest.fixture
def wrong_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this build of ONNX Runtime have a CUDA that computes wrongly."""
    opened = runtimes.open_session

    def open_session(path: Path, choice: providers.Choice, threads: int | None = None) -> runtimes.Session:
        session = opened(path, providers.reference("a fake"), threads)
        return session if choice.is_reference else Wrong(session)

    monkeypatch.setattr(runtimes, "open_session", open_session)
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )


@pytest.mark.usefixtures("wrong_cuda")
def test_a_wrong_provider_is_not_trusted(bundle: Bundle, tmp_path: Path) -> None:
    """One that was chosen gives way to the CPU, with the reason; one that was asked for is an error."""
    chosen = Models(bundle.folder, bundle.manifest, threads=1, reports=tmp_path)
    by_cpu = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1, reports=tmp_path)
    predicted = chosen.predict_noise(LATENTS, 9.0, GIVEN, guidance_scale=2.0)

    assert np.array_equal(predicted, by_cpu.predict_noise(LATENTS, 9.0, GIVEN, guidance_scale=2.0))
    assert chosen.choice.is_reference
    assert "differs from the CPU" in chosen.choice.reason
    asked = Models(bundle.folder, bundle.manifest, provider="cuda", threads=1, reports=tmp_path)
    with pytest.raises(InvalidRequest, match=r"tolerance.*`provider` to cpu"):
        asked.predict_noise(LATENTS, 9.0, GIVEN, guidance_scale=2.0)


def test_openvino_computes_the_same(bundle: Bundle, tmp_path: Path) -> None:
    """The same file by the other library, in float32 to rounding, after its self-test."""
    pytest.importorskip("openvino")
    by_cpu = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1, reports=tmp_path)
    models = Models(bundle.folder, bundle.manifest, provider="openvino:cpu:fp32", threads=1, reports=tmp_path)
    report = models.self_test()
    expected = by_cpu.predict_noise(LATENTS, 9.0, GIVEN, guidance_scale=2.0)

    np.testing.assert_allclose(
        models.predict_noise(LATENTS, 9.0, GIVEN, guidance_scale=2.0), expected, rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(models.decode(LATENTS), by_cpu.decode(LATENTS), rtol=0, atol=1e-4)
    assert report is not None
    assert report.ok


def test_a_remote_service_is_no_provider() -> None:
    """ONNX Runtime lists one that calls a service elsewhere; nothing here may use it."""
    assert not any("azure" in name.casefold() for name in providers.available_providers())
    with pytest.raises(InvalidRequest, match="choose"):
        providers.choose_provider("azure")
