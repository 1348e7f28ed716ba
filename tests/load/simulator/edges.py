"""Edge devices in virtual time: the automatic split chooses k, its advisor watches over it, then they draw."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cloud_server.engine.caller import Caller
from cloud_server.engine.job import Job
from edge_client.generation.cloud_steps import POLL_INTERVAL_S
from edge_client.request import Patience
from edge_client.split.cost_model import Costs, Curve, curve_of
from edge_client.split.handoff_policy import Advisor, Goals, choose
from hybridsd.errors import HybridSDError
from tests.load.simulator.clock import Clock
from tests.load.simulator.cloud import Cloud, Image
from tests.load.simulator.routing import Rule
from tests.load.simulator.steps import Steps

PATIENCE = Patience()
CURVE: Curve = curve_of(())
"""Of quality: the one that the product takes where a bundle has none."""
NO_GOALS = Goals()
ARRAYS_OF_A_STATE = 2
"""Arrays of a state of DPM-Solver++ 2M, of 2 bytes a number in fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of edge device, and how it is connected."""

    name: str
    share: float
    """Of all images."""
    slower: float
    """Times the reference edge's time for a step, a text and a decode."""
    round_trip_s: float = 0.03
    bytes_per_s: float = 5e6
    goals: Goals = NO_GOALS
    is_offline: bool = False


@dataclass(slots=True)
class Drawn:
    """What became of one image."""

    kind: str
    size: int
    asked_s: float
    is_offline: bool
    planned: int = 0
    """Cloud steps that the automatic split chose; 0 asks no cloud."""
    cloud_steps: int = 0
    """That the cloud ran and the edge got."""
    first_state_s: float | None = None
    """From asking."""
    handoff_s: float | None = None
    """From asking; of an image whose whole cloud part came."""
    total_s: float = 0.0
    num_refusals: int = 0
    takeover: str = ""
    """Why the edge went on earlier than planned: "advised", "refused" or "queue timeout"."""


@dataclass(kw_only=True)
class World:
    """What all images of a run share."""

    clock: Clock
    steps: Steps
    clouds: Sequence[Cloud]
    rule: Rule
    num_steps: int = 25
    drawn: list[Drawn] = field(default_factory=list)
    """Images that are finished."""


class Drawing:
    """One image, from asking to its end."""

    def __init__(self, world: World, kind: Kind, image: Image, caller: Caller) -> None:
        """Begins it; the calls of `image` are chosen here."""
        self._world, self._clock, self._kind, self._caller = world, world.clock, kind, caller
        now_s = self._clock.now_s
        assert world.steps.edge is not None
        edge = world.steps.edge[image.size]
        self._step_s, self._decode_s = kind.slower * edge.step_s, kind.slower * edge.decode_s
        self._text_s = kind.slower * edge.text_s
        self._travel_s = ARRAYS_OF_A_STATE * 2 * 4 * (image.size // 8) ** 2 / kind.bytes_per_s
        self.result = Drawn(kind.name, image.size, now_s, kind.is_offline)
        self._job: Job | None = None
        self._tried: list[Cloud] = []
        self._gives_up_s = now_s + PATIENCE.busy_timeout_s
        self._heard_s, self._position = now_s, None
        self._is_over = False
        cloud = None if kind.is_offline else world.rule(world.clouds, caller, world.num_steps, ())
        if cloud is None:
            self._finish(0)
            return
        self._advisor = self._split(cloud)
        planned = self._advisor.planned
        self.result.planned = planned
        if not planned:
            self._finish(0)
            return
        self._image = Image(
            request_id=image.request_id, model=image.model, size=image.size, calls=planned, prompt=image.prompt
        )
        self._advisor.on_begin(now_s)
        self._clock.after(kind.round_trip_s / 2 + world.steps.overhead_s / 2, lambda: self._ask(cloud))
        self._watch()

    def _split(self, cloud: Cloud) -> Advisor:
        """Returns what watches over the split that the product chooses for this device and that cloud's load."""
        load = cloud.load(self._caller)
        costs = Costs(
            cloud_step_s=load.call_s or self._step_s, edge_step_s=self._step_s, queue_s=load.wait_s,
            text_s=self._text_s, decode_s=self._decode_s, round_trip_s=self._kind.round_trip_s,
            bytes_per_s=self._kind.bytes_per_s, state_bytes=int(self._travel_s * self._kind.bytes_per_s),
        )  # fmt: skip
        num_steps = self._world.num_steps
        choice = choose(num_steps, costs, self._kind.goals, CURVE)
        return Advisor(
            num_steps=num_steps, planned=choice.cloud_steps, costs=costs, goals=self._kind.goals, curve=CURVE,
            began_s=self._clock.now_s,
        )  # fmt: skip

    def _ask(self, cloud: Cloud) -> None:
        if self._is_over:
            return
        try:
            self._job = cloud.ask(self._image, self._caller, self._on_state, self._on_queued)
        except HybridSDError as error:
            self._refused(cloud, error)
            return
        self._cloud = cloud
        self._clock.after(PATIENCE.queue_timeout_s, self._check_queue)

    def _refused(self, cloud: Cloud, error: HybridSDError) -> None:
        """Asks another cloud as the rule says, or comes again when the cloud says, or goes on alone."""
        self.result.num_refusals += 1
        self._tried.append(cloud)
        other = self._world.rule(self._world.clouds, self._caller, self._world.num_steps, self._tried)
        if other is not None:
            self._clock.after(self._kind.round_trip_s, lambda: self._ask(other))
            return
        self._tried.clear()
        delay_s = error.retry_delay_s or 0.0
        if self._clock.now_s + delay_s > self._gives_up_s:
            self._take_over("refused")
            return
        again = self._world.rule(self._world.clouds, self._caller, self._world.num_steps, ()) or cloud
        self._clock.after(delay_s + self._kind.round_trip_s, lambda: self._ask(again))

    def _check_queue(self) -> None:
        if not self._is_over and self.result.cloud_steps == 0:
            self._take_over("queue timeout")

    def _on_queued(self, position: int) -> None:
        self._position, self._heard_s = position, self._clock.now_s

    def _on_state(self, call: int) -> None:
        """A state leaves the cloud."""
        travel_s = self._kind.round_trip_s / 2 + self._travel_s
        if call == self._image.calls:
            travel_s += self._world.steps.overhead_s / 2
        self._clock.after(travel_s, lambda: self._arrived(call))

    def _arrived(self, call: int) -> None:
        if self._is_over:
            return
        now_s, result = self._clock.now_s, self.result
        result.cloud_steps, self._heard_s = call, now_s
        if result.first_state_s is None:
            result.first_state_s = now_s - result.asked_s
        if call == self._image.calls:
            result.handoff_s = now_s - result.asked_s
            self._finish(call)
            return
        if (handoff := self._advisor.on_state(call, now_s)) is not None and handoff <= call:
            self._take_over("advised")

    def _watch(self) -> None:
        """Asks the advisor while nothing comes, as often as the product does."""
        if self._is_over:
            return
        now_s = self._clock.now_s
        if now_s - self._heard_s >= POLL_INTERVAL_S - 1e-9:
            self._heard_s = now_s
            handoff = self._advisor.on_wait(self._position, now_s)
            if handoff is not None and handoff <= self.result.cloud_steps:
                self._take_over("advised")
                return
        self._clock.at(self._heard_s + POLL_INTERVAL_S, self._watch)

    def _take_over(self, why: str) -> None:
        self.result.takeover = why
        if self._job is not None:
            cloud, job = self._cloud, self._job
            self._clock.after(self._kind.round_trip_s / 2, lambda: cloud.cancel(job))
        self._finish(self.result.cloud_steps)

    def _finish(self, cloud_steps: int) -> None:
        """Runs the rest here."""
        self._is_over = True
        result = self.result
        left_s = (self._world.num_steps - cloud_steps) * self._step_s + self._decode_s
        if not cloud_steps:
            left_s += self._text_s
        result.total_s = self._clock.now_s - result.asked_s + left_s
        self._world.drawn.append(result)


def mean_cloud_steps(kinds: Sequence[Kind], steps: Steps, size: int, num_steps: int = 25) -> float:
    """Returns how many steps an image has in a cloud without load, on average over the devices."""
    assert steps.edge is not None
    total = 0.0
    for kind in kinds:
        if kind.is_offline:
            continue
        edge = steps.edge[size]
        costs = Costs(
            cloud_step_s=steps.call_s(size, 1), edge_step_s=kind.slower * edge.step_s, text_s=kind.slower * edge.text_s,
            decode_s=kind.slower * edge.decode_s, round_trip_s=kind.round_trip_s, bytes_per_s=kind.bytes_per_s,
            state_bytes=ARRAYS_OF_A_STATE * 2 * 4 * (size // 8) ** 2,
        )  # fmt: skip
        total += kind.share * choose(num_steps, costs, kind.goals, CURVE).cloud_steps
    return total / sum(kind.share for kind in kinds)
