"""Where jobs go: batches where batches pay, other devices where they do not, and not where a model is missing."""

from collections import Counter

import pytest

from cloud_server.engine.placement import Placement, StepCosts


def costs_of(placement: Placement, **seconds: dict[int, float]) -> None:
    for kind, sizes in seconds.items():
        for num_jobs, cost in sizes.items():
            placement.costs.note(kind, num_jobs, cost)


def test_costs_lie_on_lines_between_what_was_measured() -> None:
    """Below the smallest size by number, above the largest as between the last two; unknown kinds like the others."""
    costs = StepCosts()
    assert costs.call_s("x", 2) == 2 * costs.call_s("x", 1)
    costs.note("x", 2, 0.2)
    assert costs.call_s("x", 4) == pytest.approx(0.4)
    costs.note("x", 6, 0.4)
    assert costs.call_s("x", 4) == pytest.approx(0.3)
    assert costs.call_s("x", 8) == pytest.approx(0.5)
    assert costs.call_s("x", 1) == pytest.approx(0.1)
    assert costs.call_s("x", 0) == 0
    assert costs.call_s("other", 2) == pytest.approx(2 * costs.call_s("other", 1))


def test_a_free_device_is_taken_first() -> None:
    """Whatever the batch would save."""
    placement = Placement(2)
    costs_of(placement, x={1: 0.10, 8: 0.12})
    assert placement.choose([Counter(x=3), Counter()], "x", ("m",), 10) == 1


@pytest.mark.parametrize(("eight_s", "expected"), [(0.12, 0), (0.8, 1)])
def test_jobs_join_their_like_where_that_is_cheap(eight_s: float, expected: int) -> None:
    """With flat costs a third of a kind joins two on the busier device; with linear ones it goes to the emptier."""
    placement = Placement(2)
    costs_of(placement, x={1: 0.1, 8: eight_s}, y={1: 0.1, 8: eight_s})
    assert placement.choose([Counter(x=2), Counter(y=1)], "x", ("m",), 10) == expected


def test_a_missing_model_costs_its_loading() -> None:
    """A short job waits for the device that has the model, a long one pays for loading it on an idle one."""
    placement = Placement(2, load_s=lambda _model, device: 5.0 if device else 0.0)
    costs_of(placement, x={1: 0.1, 2: 0.2})
    assert placement.choose([Counter(x=1), Counter()], "x", ("m",), 10) == 0
    assert placement.choose([Counter(x=1), Counter()], "x", ("m",), 100) == 1


def test_a_lost_device_is_not_chosen() -> None:
    """Until it is back; without any there is no place."""
    placement = Placement(2)
    placement.lose(0)
    loads = [Counter[str](), Counter(x=5)]
    assert placement.choose(loads, "x", ("m",), 1) == 1
    placement.restore(0)
    assert placement.choose(loads, "x", ("m",), 1) == 0
    placement.lose(0)
    placement.lose(1)
    with pytest.raises(ValueError, match="empty"):
        placement.choose(loads, "x", ("m",), 1)


def test_jobs_move_only_where_it_helps() -> None:
    """To an idle device, not for nothing, not back and forth, and not to where the model is missing."""
    placement = Placement(2)
    costs_of(placement, x={1: 0.1, 4: 0.4})
    assert placement.relief([Counter(x=2), Counter()], 0, "x", ("m",)) == 1
    assert placement.relief([Counter(x=2), Counter(x=1)], 0, "x", ("m",)) is None
    flat = Placement(2)
    costs_of(flat, x={1: 0.1, 4: 0.105})
    assert flat.relief([Counter(x=2), Counter()], 0, "x", ("m",)) is None
    cold = Placement(2, load_s=lambda _model, device: float(device))
    assert cold.relief([Counter(x=4), Counter()], 0, "x", ("m",)) is None
