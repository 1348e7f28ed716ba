"""The curve: files that say everything, and a bundle that keeps everything else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hybridsd.errors import InvalidRequest
from hybridsd.manifest import (
    MANIFEST_NAME,
    REQUIRED_ROLES,
    Defaults,
    Manifest,
    QualityPoint,
    describe_file,
    read_manifest,
    verify_files,
    write_manifest,
)
from training.evaluation import quality
from training.evaluation.metrics import Score


def one(
    cloud_steps: int, metric: str, value: float | None, *, steps: int = 25, scheduler: str = "dpmpp_2m"
) -> quality.Measured:
    low, high = (None, None) if value is None else (value - 0.05, value + 0.05)
    score = Score(metric=metric, value=value, low=low, high=high, note="why, exactly" if value is None else "")
    return quality.Measured(scheduler=scheduler, num_inference_steps=steps, cloud_steps=cloud_steps, score=score)


MEASURED = [
    one(25, "semantic_accuracy", 0.98765432),
    one(25, "judge_fid", 1.5),
    one(10, "semantic_accuracy", 0.9),
    one(10, "judge_fid", 2.5),
    one(10, "lpips", None),
    one(0, "semantic_accuracy", 0.5),
    one(4, "semantic_accuracy", 0.7, steps=8, scheduler="lcm"),
]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An edge bundle of small files, with a curve that was measured before."""
    folder = tmp_path / "edge"
    folder.mkdir()
    files = {}
    for role in REQUIRED_ROLES:
        (folder / f"{role}.bin").write_text(role)
        files[role] = describe_file(folder, f"{role}.bin")
    manifest = Manifest(
        name="tiny",
        latent_space="tiny",
        latent_channels=4,
        vae_scale_factor=8,
        scaling_factor=1.0,
        size_multiple=8,
        prediction_type="epsilon",
        context_length=8,
        embed_dim=8,
        num_parameters={"unet": 1},
        defaults=Defaults(
            scheduler="dpmpp_2m", num_inference_steps=25, guidance_scale=4.0, width=128, height=128, cloud_steps=10
        ),
        files=files,
        quality=(
            QualityPoint(cloud_steps=12, num_inference_steps=25, metric="semantic_accuracy", value=0.1),
            QualityPoint(cloud_steps=12, num_inference_steps=50, metric="semantic_accuracy", value=0.2),
        ),
        licence="Apache-2.0",
    )
    write_manifest(manifest, folder)
    return folder


def test_points_are_one_schedulers_by_cloud_steps() -> None:
    """What has no value is left out; a manifest's numbers are rounded."""
    found = quality.points(MEASURED, scheduler="dpmpp_2m")

    assert [(point.metric, point.cloud_steps, point.value) for point in found] == [
        ("semantic_accuracy", 0, 0.5),
        ("semantic_accuracy", 10, 0.9),
        ("semantic_accuracy", 25, 0.9877),
        ("judge_fid", 10, 2.5),
        ("judge_fid", 25, 1.5),
    ]
    assert [point.num_inference_steps for point in quality.points(MEASURED, scheduler="lcm")] == [8]


def test_points_say_how_sure_they_are(bundle: Path) -> None:
    """Interval, images and seed go into the manifest and come back; who does not know them leaves them out."""
    known = quality.points(MEASURED, scheduler="dpmpp_2m", captions=300, seed=1000)
    quality.write_into_bundle(bundle, known)
    point = next(point for point in read_manifest(bundle).quality if point.cloud_steps == 10)

    assert (point.low, point.high, point.samples, point.seed) == (0.85, 0.95, 300, 1000)
    assert {(each.samples, each.seed) for each in quality.points(MEASURED, scheduler="lcm")} == {(None, None)}
    # what is not known is not written, so that older versions, which refuse unknown keys, read such a bundle
    written = json.loads((bundle / MANIFEST_NAME).read_text())["quality"]
    assert {"samples" in point for point in written if point["num_inference_steps"] == 50} == {False}


def test_controls_are_no_curve() -> None:
    """A coded hand-over, the reversed order and images without text are not what a bundle does."""

    def part(**changes: object) -> dict[str, object]:
        score = {"metric": "semantic_accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "note": ""}
        rows = [{"large_steps": 8, "codec": codec, "scores": [score]} for codec in ("fp32", "int8")]
        return {"scheduler": "dpmpp_2m", "steps": 25, "rows": rows, **changes}

    assert len(quality.measured_of(part())) == 1
    assert quality.measured_of(part(small_first=True)) == []
    assert quality.measured_of(part(empty_text=True)) == []


def test_a_bundle_gets_the_curve_and_keeps_the_rest(bundle: Path) -> None:
    """A metric measured again is replaced as a whole, others stay; files, hashes and other fields are as before."""
    before = json.loads((bundle / MANIFEST_NAME).read_text())
    names = {path.name for path in bundle.iterdir()}
    quality.write_into_bundle(bundle, quality.points(MEASURED, scheduler="dpmpp_2m"))
    after = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest = read_manifest(bundle)
    accuracy = [point for point in manifest.quality if point.metric == "semantic_accuracy"]

    assert verify_files(manifest, bundle) == []
    assert {path.name for path in bundle.iterdir()} == names
    assert {key: value for key, value in after.items() if key != "quality"} == {
        key: value for key, value in before.items() if key != "quality"
    }
    assert [(point.cloud_steps, point.num_inference_steps) for point in accuracy] == [
        (12, 50),
        (0, 25),
        (10, 25),
        (25, 25),
    ]
    again = (bundle / MANIFEST_NAME).read_bytes()
    quality.write_into_bundle(bundle, quality.points(MEASURED, scheduler="dpmpp_2m"))
    assert (bundle / MANIFEST_NAME).read_bytes() == again


def test_a_bundle_is_as_it_was_when_writing_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is replaced in one step or not at all."""

    def fail(*args: object) -> Path:
        raise OSError("No space left on device")

    before = (bundle / MANIFEST_NAME).read_bytes()
    monkeypatch.setattr(quality, "write_manifest", fail)
    with pytest.raises(OSError, match="No space"):
        quality.write_into_bundle(bundle, quality.points(MEASURED, scheduler="dpmpp_2m"))

    assert (bundle / MANIFEST_NAME).read_bytes() == before
    assert not list(bundle.glob("*.partial"))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """The message says what to give."""
    with pytest.raises(InvalidRequest, match="give the folder of an edge bundle"):
        quality.write_into_bundle(tmp_path, [])


def test_the_table_says_what_is_missing_and_reads_back(tmp_path: Path) -> None:
    """An empty cell and a reason, in a file that can be read again."""
    quality.write_csv(MEASURED, tmp_path / "curve" / "quality.csv")
    lines = (tmp_path / "curve" / "quality.csv").read_text().splitlines()

    assert lines[0] == "scheduler,num_inference_steps,cloud_steps,metric,value,low,high,note"
    assert 'dpmpp_2m,25,10,lpips,,,,"why, exactly"' in lines
    back = quality.read_csv(tmp_path / "curve" / "quality.csv")
    assert [replace(point, score=replace(point.score, value=None, low=None, high=None)) for point in back] == [
        replace(point, score=replace(point.score, value=None, low=None, high=None)) for point in MEASURED
    ]
    for point, written in zip(back, MEASURED, strict=True):
        if written.score.value is not None:
            assert point.score.value == pytest.approx(written.score.value, rel=1e-5)
        else:
            assert point.score.value is None
    assert back[0].score.low == pytest.approx(0.93765432, rel=1e-5)


def test_each_solver_has_a_plot(tmp_path: Path) -> None:
    """One panel a metric; a solver of which nothing could be measured has none."""
    unmeasured = one(3, "fid", None, steps=4, scheduler="heun")
    written = quality.publish([*MEASURED, unmeasured], tmp_path)

    assert [path.name for path in written] == ["quality.csv", "quality-dpmpp_2m-25.png", "quality-lcm-8.png"]
    with Image.open(written[1]) as two, Image.open(written[2]) as single:
        assert two.size[0] > 1.8 * single.size[0]
        assert len(single.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 20
    assert not quality.plot([unmeasured], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
