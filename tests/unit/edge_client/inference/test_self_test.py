"""A finding about a provider is remembered for the same files, looked for again after a change, and kept to."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import open_bundle
from edge_client.inference import providers, self_test
from edge_client.inference import session as runtimes
from edge_client.inference.models import Models
from edge_client.inference.self_test import Report, relative_error
from hybridsd.errors import InvalidRequest
from tests.support.tiny_bundle import Floats, write_bundle


class Device:
    """A CUDA that this build of ONNX Runtime seems to have: computes on the CPU, with a twist, and is counted.

    Attributes:
        runs: The files that it ran, by name, in order.
        twist: What becomes of an output.
    """

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.twist: Callable[[Floats], Floats] = lambda array: array

    def ran(self) -> list[str]:
        """Returns what was run since this was asked last."""
        runs, self.runs = self.runs, []
        return runs


class _OnDevice:
    def __init__(self, session: runtimes.Session, name: str, device: Device) -> None:
        self._session, self._name, self._device = session, name, device
        self.inputs, self.outputs = session.inputs, session.outputs

    def run(self, feeds: Any) -> list[Any]:
        self._device.runs.append(self._name)
        return [self._device.twist(array) for array in self._session.run(feeds)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The provider "cuda"."""
    opened, device = runtimes.open_session, Device()

    def open_session(path: Path, choice: providers.Choice, threads: int | None = None) -> runtimes.Session:
        session = opened(path, providers.reference("a fake"), threads)
        return session if choice.is_reference else _OnDevice(session, path.stem, device)

    monkeypatch.setattr(runtimes, "open_session", open_session)
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    return device


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return tmp_path / "reports"


def models(folder: Path, reports: Path, *, provider: str | None = "cuda", **options: Any) -> Models:
    """Opens a bundle as a process that has just begun does; `options` write it first."""
    if options or not folder.exists():
        write_bundle(folder, **options)
    bundle = open_bundle(folder)
    return Models(bundle.folder, bundle.manifest, provider=provider, threads=1, reports=reports)


TESTED = ["unet", "vae_decoder"]


def test_a_finding_is_remembered_for_the_same_files(device: Device, tmp_path: Path, reports: Path) -> None:
    """The next start runs nothing; nor does another copy of the files, whatever else the bundle says."""
    first = models(tmp_path / "a", reports).self_test()
    assert device.ran() == TESTED
    second = models(tmp_path / "a", reports).self_test()
    copy = models(tmp_path / "b", reports, guidance_scale=5.0).self_test()

    assert device.ran() == []
    assert first is not None
    assert first.ok
    assert first == second == copy


def test_asking_afresh_looks_again(device: Device, tmp_path: Path, reports: Path) -> None:
    """What the doctor does; its finding is what is remembered then."""
    models(tmp_path / "a", reports).self_test()
    device.twist = lambda array: 1.5 * array
    with pytest.raises(InvalidRequest, match="differs"):
        models(tmp_path / "a", reports).self_test(fresh=True)
    assert device.ran() == [*TESTED, *TESTED]
    with pytest.raises(InvalidRequest, match="differs"):
        models(tmp_path / "a", reports).self_test()
    assert device.ran() == []


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"cell": 4}, {"provider": "cuda:fp32"}],
    ids=["all files", "the decoder", "the precision"],
)
def test_a_change_is_tested_again(change: dict[str, Any], device: Device, tmp_path: Path, reports: Path) -> None:
    """Of either file that is tested, or of how it is computed; the finding before it stays remembered."""
    before = models(tmp_path / "a", reports)
    before.self_test()
    assert device.ran() == TESTED
    after = models(tmp_path / "b", reports, **change)
    hashes = [[opened.manifest.files[role].sha256 for role in TESTED] for opened in (before, after)]
    if change == {"cell": 4}:
        assert hashes[0][0] == hashes[1][0]
    device.twist = lambda array: 1.5 * array
    with pytest.raises(InvalidRequest, match="differs"):
        after.self_test()

    assert device.ran() == TESTED
    report = models(tmp_path / "a", reports).self_test()
    assert report is not None
    assert report.ok
    assert device.ran() == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"provider": "cuda"', '{"error": 0.0}'])
def test_what_cannot_be_read_is_tested_again(content: str, device: Device, tmp_path: Path, reports: Path) -> None:
    """A remembered finding that was cut short, or is of another version, is none."""
    expected = models(tmp_path / "a", reports).self_test()
    device.ran()
    (remembered,) = reports.iterdir()
    remembered.write_text(content)

    assert models(tmp_path / "a", reports).self_test() == expected
    assert device.ran() == TESTED


def test_a_folder_that_cannot_be_written_costs_only_time(device: Device, tmp_path: Path) -> None:
    """Nothing is remembered then, and nothing fails."""
    (tmp_path / "file").touch()
    for _ in range(2):
        report = models(tmp_path / "a", tmp_path / "file" / "reports").self_test()
        assert report is not None
        assert report.ok
        assert device.ran() == TESTED


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_provider_whose_output_is_not_finite_is_refused(
    value: float, device: Device, tmp_path: Path, reports: Path
) -> None:
    """One bad value is enough, now and when it is remembered; a provider that was not asked for gives way."""

    def spoil(array: Floats) -> Floats:
        spoilt = array.copy()
        spoilt.flat[-1] = value
        return spoilt

    device.twist = spoil
    for runs in (TESTED, []):
        asked = models(tmp_path / "a", reports)
        with pytest.raises(
            InvalidRequest, match=r"`provider` cuda differs from the CPU by inf: .*set `provider` to cpu"
        ) as caught:
            asked.decode(np.zeros((4, 4, 4), dtype=np.float32))
        assert caught.value.field == "provider"
        assert device.ran() == runs
    chosen = models(tmp_path / "a", reports, provider=None)
    by_cpu = models(tmp_path / "a", reports, provider="cpu")
    latents = np.ones((4, 4, 4), dtype=np.float32)

    assert np.array_equal(chosen.decode(latents), by_cpu.decode(latents))
    assert chosen.choice.is_reference
    assert "by inf" in chosen.choice.reason
    assert device.ran() == []


def test_an_error_that_is_no_number_is_too_large(tmp_path: Path) -> None:
    """Other shapes and values that are not finite are infinitely far, and the file that remembers them says so."""
    reference = np.ones((2, 3), dtype=np.float32)
    assert relative_error(reference, reference) == 0
    assert relative_error(1.25 * reference, reference) == pytest.approx(0.25)
    for wrong in (np.ones((3, 2)), np.full((2, 3), np.nan), np.full((2, 3), np.inf)):
        error = relative_error(wrong, reference)
        report = Report(provider="cuda", error=error, tolerance=1e-3)
        self_test.remember(tmp_path, "name", report)

        assert error == np.inf
        assert not report.ok
        assert self_test.recall(tmp_path, "name") == report


def test_a_cpu_whose_output_is_not_finite_is_no_reference() -> None:
    """Then nothing can be said of a provider, which is an error and not a success."""
    fine, broken = np.ones(4, dtype=np.float32), np.array([1, np.nan, 1, 1], dtype=np.float32)

    assert math.isinf(
        self_test.compare(
            lambda role, reference: broken if reference and role == "vae_decoder" else fine, ("unet", "vae_decoder")
        )
    )
