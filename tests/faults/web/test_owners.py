"""One client's flood is not another's loss: places in the queue, turns, images that are kept."""

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.integration.web.conftest import TOKENS, Gate, finish, picture, serving, submit, wait_for


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def kept(client: httpx.Client) -> list[str]:
    return [job["id"] for job in client.get("/v1/jobs").json()["jobs"]]


def test_a_full_queue_is_not_full_for_others(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate
) -> None:
    """One token's jobs of ten images take all places; the other's first job is taken, and begins next."""
    settings: dict[str, Any] = {"tokens": TOKENS, "max_queue": 4, "workers": 1}
    with (
        serving(tmp_path, bundle, models, cloud, **settings) as server,
        server.client(headers=bearer(TOKENS[0])) as one,
        server.client(headers=bearer(TOKENS[1])) as two,
    ):
        gate.close()
        running = submit(one, n=2)
        gate.wait()
        flood = [submit(one, n=10) for _ in range(4)]
        refused = one.post("/v1/jobs", json={"prompt": "a fox"})
        job = submit(two)
        ahead = [one.get(f"/v1/jobs/{each['id']}").json()["queue_position"] for each in flood]

        assert (refused.status_code, refused.json()["reason"]) == (429, "TOO_MANY_JOBS")
        assert (job["queue_position"], ahead) == (0, [1, 2, 3, 4])
        for each in flood:
            one.post(f"/v1/jobs/{each['id']}/cancel")
        gate.open()
        assert wait_for(two, job["id"]).name == "completed"
        assert wait_for(one, running["id"]).name == "completed"


@pytest.mark.parametrize("limit", [{"max_jobs": 3}, {"max_data_bytes": 5_000}], ids=["jobs", "bytes"])
def test_a_flood_does_not_evict_others(
    limit: dict[str, Any], tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud
) -> None:
    """Whoever keeps most loses the oldest."""
    with (
        serving(tmp_path, bundle, models, cloud, tokens=TOKENS, **limit) as server,
        server.client(headers=bearer(TOKENS[0])) as one,
        server.client(headers=bearer(TOKENS[1])) as two,
    ):
        image = finish(two)["images"][0]["url"]
        flood = [finish(one, seed=seed)["id"] for seed in range(6)]

        assert two.get(image).status_code == 200
        assert len(kept(two)) == 1
        assert 1 <= len(kept(one)) < 6
        assert kept(one) == flood[::-1][: len(kept(one))]


def test_uploads_of_waiting_jobs_are_bounded(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate
) -> None:
    """They have a share of the folder; without an image there is room, and for others too."""
    content = picture((64, 64))
    text = base64.b64encode(content).decode()
    settings: dict[str, Any] = {"tokens": TOKENS, "max_data_bytes": 4 * 2 * len(content) + 80}
    with (
        serving(tmp_path, bundle, models, cloud, workers=1, **settings) as server,
        server.client(headers=bearer(TOKENS[0])) as one,
        server.client(headers=bearer(TOKENS[1])) as two,
    ):
        gate.close()
        jobs = [submit(one, image=text, seed=seed) for seed in range(2)]
        refused = one.post("/v1/jobs", json={"prompt": "a fox", "image": text})
        assert (refused.status_code, refused.json()["reason"]) == (429, "TOO_MANY_JOBS")
        jobs += [submit(one)]
        other = submit(two, image=text)
        gate.open()
        assert {wait_for(one, job["id"]).name for job in jobs} == {"completed"}
        assert wait_for(two, other["id"]).name == "completed"
