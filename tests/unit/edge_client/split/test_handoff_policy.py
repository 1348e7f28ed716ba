"""The choice of a split goes the right way, and its reckoning is what a simulated cloud, link and edge then do."""

from dataclasses import replace

import pytest

from edge_client.split.cost_model import Costs, Curve, curve_of, predict
from edge_client.split.handoff_policy import Advisor, Goals, choose, explain
from hybridsd.manifest import QualityPoint

STEPS = 25
CURVE = curve_of([])
COSTS = Costs(
    cloud_step_s=0.1, edge_step_s=0.2, queue_s=0.2, text_s=0.05, decode_s=0.1, round_trip_s=0.05, bytes_per_s=1e6,
    state_bytes=32_768,
)  # fmt: skip


class Simulation:
    """A cloud, a link and an edge with a clock of their own; each may be slow, and turn slow on the way."""

    def __init__(self, costs: Costs, *, slow_after: int = 10**6, slowdown: float = 1.0) -> None:
        self.costs, self.slow_after, self.slowdown = costs, slow_after, slowdown

    def run(self, planned: int, advisor: Advisor | None = None, *, poll_interval_s: float = 0.5) -> tuple[float, int]:
        """Returns how long an image takes, and how many steps the cloud ran."""
        costs, now, done = self.costs, self.costs.text_s, 0
        travel_s = costs.state_bytes / costs.bytes_per_s
        if planned:
            if advisor is not None:
                advisor.on_begin(now)
            ready = now + costs.queue_s
            computed, arrived = ready, 0.0
            for step in range(1, planned + 1):
                factor = self.slowdown if step > self.slow_after else 1.0
                computed += costs.cloud_step_s * factor
                arrived = max(computed, arrived) + travel_s if step > 1 else computed + travel_s + costs.round_trip_s
                while advisor is not None and arrived - now > poll_interval_s:
                    now += poll_interval_s
                    if advisor.on_wait(0, now) is not None:
                        return now + (STEPS - done) * costs.edge_step_s + costs.decode_s, done
                now, done = arrived, step
                if advisor is not None and step < planned and advisor.on_state(step, now) is not None:
                    break
        return now + (STEPS - done) * costs.edge_step_s + costs.decode_s, done


@pytest.mark.parametrize("k", [0, 1, 8, 25])
@pytest.mark.parametrize("changes", [{}, {"bytes_per_s": 2e5}, {"queue_s": 3.0}, {"edge_step_s": 1.0}])
def test_the_reckoning_is_what_happens(k: int, changes: dict[str, float]) -> None:
    """The estimate of every split is the simulated time, within a state's journey."""
    costs = replace(COSTS, **changes)
    simulated, done = Simulation(costs).run(k)

    assert done == k
    assert abs(predict(k, STEPS, costs, CURVE).total_s - simulated) < 0.25


def test_each_slowness_moves_the_split_its_way() -> None:
    """A slow edge gives steps to the cloud; a slow cloud, a long queue or a slow link take them away."""
    goals = Goals(max_latency_s=4.0)
    usual = choose(STEPS, COSTS, goals, CURVE).cloud_steps

    assert 0 < usual < STEPS or usual == STEPS
    slow_cloud = replace(COSTS, cloud_step_s=0.25, edge_step_s=0.15)
    assert choose(STEPS, slow_cloud, goals, CURVE).cloud_steps < usual
    assert choose(STEPS, replace(slow_cloud, queue_s=1.0), goals, CURVE).cloud_steps < usual
    slow_link = replace(COSTS, bytes_per_s=1e5, edge_step_s=0.12)
    assert choose(STEPS, slow_link, goals, CURVE).cloud_steps < usual
    quick_edge, slow_edge = (replace(COSTS, edge_step_s=s, cloud_step_s=0.15) for s in (0.155, 0.6))
    few = choose(STEPS, quick_edge, Goals(quality=0.5), CURVE)
    many = choose(STEPS, slow_edge, Goals(quality=0.5, max_latency_s=6.0), CURVE)
    assert many.estimate.quality >= few.estimate.quality
    late = choose(STEPS, replace(COSTS, cloud_step_s=9.0, edge_step_s=9.0), goals, CURVE)
    assert "fastest" in " ".join(late.reasons)
    assert late.cloud_steps == 0


def test_goals_are_kept() -> None:
    """Quality asks for the fewest steps that have it; a limit of cloud steps always holds."""
    half, high = (choose(STEPS, COSTS, Goals(quality=q), CURVE) for q in (0.5, 0.9))
    limited = choose(STEPS, COSTS, Goals(quality=0.9, max_cloud_steps=3), CURVE)

    assert half.estimate.quality >= 0.5
    assert half.table[half.cloud_steps - 1].quality < 0.5
    assert half.cloud_steps < high.cloud_steps
    assert limited.cloud_steps == 3
    assert "best" in " ".join(limited.reasons)
    assert choose(STEPS, COSTS, Goals(quality=0.0), CURVE).cloud_steps == 0
    assert 0 < choose(STEPS, COSTS, Goals(), CURVE).cloud_steps < STEPS


def test_a_measured_curve_rises() -> None:
    """PSNR of a bundle becomes a curve from 0 to 1 that never falls."""
    points = [
        QualityPoint(cloud_steps=k, num_inference_steps=25, metric="psnr", value=value)
        for k, value in ((0, 26.0), (5, 28.0), (8, 27.9), (18, 33.1))
    ]
    curve = curve_of(points)
    values = [curve(share / 25) for share in range(26)]

    assert isinstance(curve, Curve)
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 1.0)
    assert "measured" in curve.source


def accuracy_of(*values: tuple[int, float], steps: int = 25) -> list[QualityPoint]:
    return [
        QualityPoint(cloud_steps=k, num_inference_steps=steps, metric="semantic_accuracy", value=value)
        for k, value in values
    ]


LIKENESS = [
    QualityPoint(cloud_steps=k, num_inference_steps=25, metric="psnr", value=value)
    for k, value in ((0, 26.0), (8, 29.4), (18, 33.1))
]


def test_accuracy_bends_the_curve_where_the_large_model_leads() -> None:
    """A split that is as often right as the large model has nearly all of the quality, however unlike its image is."""
    curve = curve_of([*LIKENESS, *accuracy_of((0, 0.70), (8, 0.90), (12, 0.91), (25, 0.92))])
    likeness = curve_of(LIKENESS)
    values = [curve(share / 25) for share in range(26)]

    assert curve(8 / 25) == pytest.approx(20 / 22)
    assert likeness(8 / 25) < 0.5
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 1.0)
    assert "accuracy" in curve.source
    equal = replace(COSTS, cloud_step_s=0.2, edge_step_s=0.2)
    assert choose(STEPS, equal, Goals(), curve).cloud_steps < choose(STEPS, equal, Goals(), likeness).cloud_steps
    assert choose(STEPS, equal, Goals(quality=0.9), curve).cloud_steps == 8


def test_likeness_is_the_curve_where_accuracy_tells_nothing() -> None:
    """The edge's own is about as often right, or one end was not measured."""
    for accuracy in (
        accuracy_of((0, 0.99), (8, 1.0), (25, 0.98)),
        accuracy_of((0, 0.90), (8, 0.94), (25, 0.94)),
        accuracy_of((8, 0.90), (12, 0.91), (25, 0.95)),
        accuracy_of((0, 0.60), (25, 0.95)),
    ):
        assert "PSNR" in curve_of([*LIKENESS, *accuracy]).source


def test_only_the_cloud_alone_has_all_of_the_quality() -> None:
    """A split that chance puts above the large model is not as good as it: who asks for 1 gets the large model's."""
    curve = curve_of(accuracy_of((0, 0.70), (8, 0.93), (12, 0.91), (25, 0.92)))

    assert curve(8 / 25) == curve(12 / 25) == pytest.approx(0.99)
    assert choose(STEPS, COSTS, Goals(quality=1.0), curve).cloud_steps == STEPS


def test_curves_of_two_numbers_of_steps_are_not_mixed() -> None:
    """The one with most points counts."""
    points = [*accuracy_of((0, 0.1), (4, 0.2), steps=8), *accuracy_of((0, 0.70), (8, 0.90), (25, 0.92))]

    assert curve_of(points)(8 / 25) == pytest.approx(20 / 22)


def advisor_of(costs: Costs, planned: int, goals: Goals | None = None) -> Advisor:
    return Advisor(
        num_steps=STEPS, planned=planned, costs=costs, goals=goals or Goals(), curve=CURVE, began_s=costs.text_s
    )


@pytest.mark.parametrize("slowdown", [8.0, 40.0])
def test_a_cloud_that_turns_slow_is_left(slowdown: float) -> None:
    """The edge goes on earlier, and the image is done sooner than without; a steady cloud is never left."""
    slow = Simulation(COSTS, slow_after=4, slowdown=slowdown)
    advisor = advisor_of(COSTS, 15)
    stayed_s, _ = slow.run(15)
    left_s, done = slow.run(15, advisor)

    assert 4 <= done < 15
    assert left_s < stayed_s
    assert "save" in advisor.reason
    assert Simulation(COSTS).run(15, advisor_of(COSTS, 15))[1] == 15
    known = replace(COSTS, cloud_step_s=0.3, edge_step_s=0.1)  # slower than the edge, but for its quality chosen so
    assert Simulation(known).run(15, advisor_of(known, 15))[1] == 15


def test_a_queue_that_does_not_move_is_left() -> None:
    """Waiting far longer than was said ends in the edge doing it alone."""
    stuck = Simulation(replace(COSTS, queue_s=60.0))
    _, done = stuck.run(10, advisor_of(COSTS, 10))

    assert done == 0


def test_asked_quality_is_not_given_up_for_time() -> None:
    """Below the quality that was asked for, the cloud is not left, unless there is a limit of time as well."""
    slow = Simulation(COSTS, slow_after=2, slowdown=30.0)

    assert slow.run(10, advisor_of(COSTS, 10, Goals(quality=0.6)))[1] >= 9
    assert slow.run(10, advisor_of(COSTS, 10, Goals(quality=0.6, max_latency_s=5.0)))[1] < 9
    assert slow.run(10, advisor_of(COSTS, 10, Goals(quality=0.6, max_latency_s=600.0)))[1] >= 9


def test_the_reckoning_can_be_read() -> None:
    """One line for each split, the chosen one marked, and the reasons below."""
    choice = choose(STEPS, COSTS, Goals(quality=0.5), CURVE)
    text = explain(choice)

    assert sum(line.startswith(">") for line in text.splitlines()) == 1
    assert len(text.splitlines()) == 1 + 26 + len(choice.reasons)
    limited = explain(choose(STEPS, COSTS, Goals(max_cloud_steps=2), CURVE)).splitlines()
    assert [line.split()[-7] for line in limited[1:4]] == ["25", "24", "23"]


@pytest.mark.parametrize("goals", [Goals(), Goals(quality=0.0), Goals(max_latency_s=0.001), Goals(max_latency_s=60.0)])
def test_a_device_that_cannot_begin_gets_no_earlier_split(goals: Goals) -> None:
    """Whatever is asked for, and however slow the cloud turns on the way."""
    slow = replace(COSTS, cloud_step_s=5.0, edge_step_s=0.01)
    choice = choose(STEPS, slow, goals, CURVE, least=9)
    assert choice.cloud_steps >= 9
    assert [each.cloud_steps for each in choice.table] == list(range(9, STEPS + 1))
    assert any("at least 9 cloud steps" in reason for reason in choice.reasons)

    simulated = Simulation(COSTS, slow_after=2, slowdown=50.0)
    free, bound = (replace(advisor_of(COSTS, 20), least=least) for least in (0, 9))
    assert simulated.run(20, free)[1] < 9
    assert simulated.run(20, bound)[1] >= 9
