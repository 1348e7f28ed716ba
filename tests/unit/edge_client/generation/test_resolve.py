"""Defaults of a request, and what does not fit together."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.generation import saved_state
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.segments import parse_segments
from edge_client.request import Request, SavedState
from hybridsd.errors import InvalidRequest, Reason


@pytest.mark.parametrize(("steps", "cloud_steps"), [(6, 3), (10, 5), (1, 0), (2, 1)])
def test_default_split_keeps_its_share(steps: int, cloud_steps: int, bundle: Bundle) -> None:
    """With other numbers of steps the cloud runs the same share of them."""
    assert resolve(Request(prompt="x", num_inference_steps=steps), bundle.manifest).cloud_steps == cloud_steps


def test_guidance_is_rescaled_where_there_is_guidance(bundle: Bundle) -> None:
    """A segment without guidance has nothing to rescale; its own value counts before the image's."""
    text = "a:2@cloud(guidance=1),b:2@edge,c:2@edge(rescale=0.25)"
    asked = Request(
        prompt="x", num_inference_steps=6, guidance_scale=3.0, guidance_rescale=0.7, segments=parse_segments(text)
    )
    stages = resolve(asked, bundle.manifest).stages

    assert [stage.guidance_rescale for stage in stages] == [0.0, 0.7, 0.25]
    again = parse_segments(",".join(stage.describe() for stage in stages))
    assert [segment.guidance_rescale for segment in again] == [None, 0.7, 0.25]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"guidance_rescale": 1.5}, "`guidance_rescale` is 1.5; choose 0 to 1"),
        ({"guidance_rescale": float("nan")}, "choose 0 to 1"),
        ({"guidance_rescale": 0.7, "guidance_scale": 1.0}, "no effect at `guidance_scale` 1"),
        ({"segments": "a:6@edge(guidance=1,rescale=0.5)"}, "raise its guidance"),
        ({"segments": "a:6@edge(rescale=2)"}, "choose 0 to 1"),
    ],
)
def test_a_rescale_without_effect_is_refused(changes: dict[str, Any], says: str, bundle: Bundle) -> None:
    """And one that is out of range."""

    def resolved() -> None:
        segments = parse_segments(changes["segments"]) if "segments" in changes else ()
        resolve(Request(prompt="x", num_inference_steps=6, **{**changes, "segments": segments}), bundle.manifest)

    with pytest.raises(InvalidRequest) as refused:
        resolved()
    assert refused.value.reason is Reason.GUIDANCE_INVALID
    assert says in refused.value.message


@pytest.mark.parametrize(
    "changes", [{"max_state_bytes": -1}, {"max_state_bytes": 2**31}, {"state_psnr": 33.9}, {"state_psnr": float("nan")}]
)
def test_how_true_states_are_is_checked(changes: dict[str, Any], bundle: Bundle) -> None:
    """A message holds no more than 32 bits of `max_state_bytes`."""
    with pytest.raises(InvalidRequest, match=r"choose (0|34)") as refused:
        resolve(Request(prompt="x", **changes), bundle.manifest)
    assert refused.value.field == next(iter(changes))


@pytest.mark.parametrize("changes", [{"max_state_bytes": 1000}, {"state_psnr": 80.0}])
def test_how_true_states_are_is_not_dropped_with_another_codec(changes: dict[str, Any], bundle: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="`codec` fp16 does not go by; leave it out") as refused:
        resolve(Request(prompt="x", codec="fp16", **changes), bundle.manifest)
    assert refused.value.field == next(iter(changes))


def test_a_saved_state_keeps_its_rescale(result: Result, bundle: Bundle, tmp_path: Path) -> None:
    """What goes on from it is guided as it began; a state of an earlier version was not rescaled."""
    path = tmp_path / "s.npz"
    saved = dataclasses.replace(saved_state.saved_state(result, bundle.manifest.latent_space), guidance_rescale=0.6)
    path.write_bytes(saved_state.dump(saved))
    loaded = saved_state.load(path)

    assert isinstance(loaded, SavedState)
    assert (
        resolve(Request(resume=dataclasses.replace(loaded, call=3)), bundle.manifest).stages[-1].guidance_rescale == 0.6
    )
