"""What `hybridsd generate` can do, the gateway can too: segments, other edge models, a chosen split."""

from pathlib import Path

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.integration.web.conftest import ask, finish, pixels, serving
from tests.support.tiny_bundle import write_bundle


def test_segments_may_name_other_models_of_the_device(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud
) -> None:
    """A second edge model draws its steps, and the image is not that of the first one."""
    write_bundle(tmp_path / "other", seed=1)
    other = open_bundle(tmp_path / "other")
    others = {"other": Models(other.folder, other.manifest, provider="cpu", threads=1)}
    with serving(tmp_path / "data", bundle, models, cloud, others=others) as server, server.client() as client:
        jobs = [
            finish(client, hybrid={"segments": f"fake-large:2@cloud,{name}:4@edge"})
            for name in (bundle.manifest.name, "other")
        ]
        drawn = [pixels(client.get(job["images"][0]["url"]).content) for job in jobs]
        unknown = client.post("/v1/jobs", json=ask(hybrid={"segments": "fake-large:2@cloud,nobody:4@edge"}))

    assert [job["state"] for job in jobs] == ["completed"] * 2
    assert [[step["place"] for step in job["images"][0]["steps"]] for job in jobs] == [["cloud"] * 2 + ["edge"] * 4] * 2
    assert (drawn[0] != drawn[1]).any()
    assert (unknown.status_code, unknown.json()["reason"]) == (409, "MODEL_UNKNOWN")


def test_a_split_is_chosen_for_a_goal(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Full quality is the cloud's image, none the edge's own; the reasons are told."""
    with serving(tmp_path, bundle, models, cloud) as server, server.client() as client:
        best, least = (finish(client, hybrid={"quality": quality}) for quality in (1.0, 0.0))
        events = client.get(f"/v1/jobs/{best['id']}/events").text
        both = client.post("/v1/jobs", json={"prompt": "a fox", "hybrid": {"quality": 1, "split": "2,4"}})

    assert best["images"][0]["planned_cloud_steps"] == 6
    assert least["images"][0]["planned_cloud_steps"] == 0
    assert "event: split" in events
    assert (both.status_code, both.json()["reason"]) == (422, "SPLIT_INVALID")
