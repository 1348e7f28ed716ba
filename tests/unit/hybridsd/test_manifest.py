"""A bundle's manifest is checked when it is read, and its files when they are verified."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybridsd.errors import InvalidRequest, Reason
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


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose files are a few bytes each."""
    for role in REQUIRED_ROLES:
        (tmp_path / f"{role}.bin").write_bytes(role.encode())
    manifest = Manifest(
        name="test",
        latent_space="sd1",
        latent_channels=4,
        vae_scale_factor=8,
        scaling_factor=0.18215,
        size_multiple=64,
        prediction_type="epsilon",
        context_length=77,
        embed_dim=768,
        num_parameters={"unet": 224_490_116},
        defaults=Defaults(
            scheduler="dpmpp_2m", num_inference_steps=25, guidance_scale=7.0, width=512, height=512, cloud_steps=10
        ),
        files={role: describe_file(tmp_path, f"{role}.bin") for role in REQUIRED_ROLES},
        quality=(QualityPoint(cloud_steps=10, num_inference_steps=25, metric="fid", value=13.75),),
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def rewrite(bundle: Path, change: Any) -> None:
    raw = json.loads((bundle / MANIFEST_NAME).read_text())
    change(raw)
    (bundle / MANIFEST_NAME).write_text(json.dumps(raw))


def test_round_trip(bundle: Path) -> None:
    """What is written is what is read, and untouched files are fine."""
    manifest = read_manifest(bundle)

    assert manifest.quality[0].value == 13.75
    assert manifest.defaults.cloud_steps == 10
    assert verify_files(manifest, bundle) == []


def test_changed_missing_and_cut_files_are_each_named(bundle: Path) -> None:
    """Verification finds every way in which a file can be wrong."""
    (bundle / "unet.bin").write_bytes(b"UNET")
    (bundle / "plans.bin").write_bytes(b"p")
    (bundle / "tokenizer.bin").unlink()
    problems = verify_files(read_manifest(bundle), bundle)

    assert [p.split(":")[0] for p in problems] == ["unet", "tokenizer", "plans"]
    assert "SHA-256" in problems[0]
    assert "missing" in problems[1]
    assert "1 bytes" in problems[2]


BROKEN = {
    "future format": lambda raw: raw.update(format=2),
    "missing role": lambda raw: raw["files"].pop("unet"),
    "path leaves the folder": lambda raw: raw["files"]["unet"].update(path="../../etc/passwd"),
    "absolute path": lambda raw: raw["files"]["unet"].update(path="/etc/passwd"),
    "backslash": lambda raw: raw["files"]["unet"].update(path="..\\x"),
    "bad hash": lambda raw: raw["files"]["unet"].update(sha256="0"),
    "bad name": lambda raw: raw.update(name="a/b"),
    "unknown field": lambda raw: raw.update(surprise=1),
    "missing field": lambda raw: raw.pop("latent_space"),
    "defaults are no object": lambda raw: raw.update(defaults=3),
    "files are a list": lambda raw: raw.update(files=[]),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_manifest_is_refused(bundle: Path, how: str) -> None:
    """Whatever is wrong with a manifest, the error is MANIFEST_INVALID and names model.json."""
    rewrite(bundle, BROKEN[how])

    with pytest.raises(InvalidRequest, match=r"model\.json") as caught:
        read_manifest(bundle)
    assert caught.value.reason is Reason.MANIFEST_INVALID


def test_no_manifest_and_no_json(tmp_path: Path) -> None:
    """A folder without a manifest, and a manifest that is no JSON, each say so."""
    with pytest.raises(InvalidRequest, match=r"has no model\.json"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.raises(InvalidRequest, match="is not a manifest"):
        read_manifest(tmp_path)


def test_levels_are_read_and_tell_the_unet(bundle: Path) -> None:
    """A specialist draws up to its timestep; with a second U-Net the calls above run that, at fractions too."""
    rewrite(bundle, lambda raw: raw.update(max_timestep=779))
    one = read_manifest(bundle)
    rewrite(bundle, lambda raw: raw["files"].update(unet_high_noise=raw["files"]["unet"]))
    two = read_manifest(bundle)

    assert (one.highest_timestep, two.highest_timestep) == (779, None)
    assert [one.unet_role(t) for t in (0.0, 779.0, 999.0)] == ["unet"] * 3
    assert [two.unet_role(t) for t in (0.0, 779.0, 779.4, 999.0)] == ["unet", "unet", *["unet_high_noise"] * 2]
    assert [one.is_trained_for(t) for t in (779.0, 779.4)] == [True, False]
    assert two.is_trained_for(999.0)


@pytest.mark.parametrize("value", [-1, 1000, "779", True, float("nan")])
def test_a_level_that_is_none_is_refused(value: object, bundle: Path) -> None:
    """It must be a timestep of the training schedule."""
    rewrite(bundle, lambda raw: raw.update(max_timestep=value))
    with pytest.raises(InvalidRequest, match=r"max_timestep is .*; it must be 0 to 999"):
        read_manifest(bundle)


def test_a_second_unet_needs_a_level(bundle: Path) -> None:
    """Or nobody knows when it runs."""
    rewrite(bundle, lambda raw: raw["files"].update(unet_high_noise=raw["files"]["unet"]))
    with pytest.raises(InvalidRequest, match="no max_timestep"):
        read_manifest(bundle)


def test_only_bundles_with_a_level_say_one(bundle: Path) -> None:
    """Readers refuse keys that they do not know: older ones still read all other bundles."""
    assert "max_timestep" not in json.loads((bundle / MANIFEST_NAME).read_text())
    rewrite(bundle, lambda raw: raw.update(of_tomorrow=1))
    with pytest.raises(InvalidRequest, match=r"'of_tomorrow', which this version does not know.*update hybridsd"):
        read_manifest(bundle)
