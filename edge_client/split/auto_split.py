"""An automatic split: measures this device and the cloud, and lets the policy choose."""

import time
from dataclasses import dataclass, replace

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.generation.components import Components
from edge_client.generation.levels import least_cloud_steps
from edge_client.generation.schedules import foresee_plan
from edge_client.inference.models import Models
from edge_client.request import Resolved
from edge_client.split.cost_model import Costs, curve_of
from edge_client.split.handoff_policy import Advisor, Choice, Goals, choose
from edge_client.split.measure import measure
from hybridsd.errors import Reason
from hybridsd.manifest import Manifest


@dataclass(frozen=True, slots=True)
class AutoSplit:
    """A chosen split, and what watches over it."""

    choice: Choice
    costs: Costs
    goals: Goals
    least: int
    """Before so many cloud steps the edge's U-Net is not trained."""

    def advisor(self, resolved: Resolved, bundle: Bundle) -> Advisor:
        """Returns what reconsiders the split while the cloud works; its clock begins now."""
        return Advisor(
            num_steps=resolved.num_inference_steps, planned=self.choice.cloud_steps, costs=self.costs, goals=self.goals,
            curve=curve_of(bundle.manifest.quality), began_s=time.perf_counter(), least=self.least,
        )  # fmt: skip


def check_goals(goals: Goals, least: int, resolved: Resolved, manifest: Manifest) -> None:
    """Refuses goals that end the cloud's part above the level that the edge's U-Net is trained for.

    Args:
        goals: What the user wants.
        least: After how many cloud steps the edge can draw.
        resolved: The request.
        manifest: Of the bundle.

    Raises:
        InvalidRequest: SPLIT_INVALID, naming `max_cloud_steps`.
    """
    if goals.max_cloud_steps is not None and goals.max_cloud_steps < least:
        raise Reason.SPLIT_INVALID.error(
            f"`max_cloud_steps` is {goals.max_cloud_steps}, but the U-Net of bundle {manifest.name} is trained for "
            f"timesteps up to {manifest.highest_timestep:g} only, which begin at step {least} of "
            f"{resolved.num_inference_steps}; choose {least} or more",
            field="max_cloud_steps",
        )


def choose_split(resolved: Resolved, goals: Goals, bundle: Bundle, models: Models, cloud: Pool | Cloud) -> AutoSplit:
    """Returns the split for a request: this device is timed on one step and one decode, the cloud asked.

    Raises:
        InvalidRequest: See `check_goals`.
    """
    components = Components(bundle=bundle, models=models, others={}, cloud=Pool.of(cloud))
    least = least_cloud_steps(
        resolved, bundle.manifest, lambda schedule: foresee_plan(schedule, components, resolved.request.model)
    )
    check_goals(goals, least, resolved, bundle.manifest)
    costs, notes = measure(resolved, bundle, models, cloud)
    goals_now = replace(goals, max_cloud_steps=least) if notes.is_away else goals
    choice = choose(resolved.num_inference_steps, costs, goals_now, curve_of(bundle.manifest.quality), least=least)
    choice = replace(choice, reasons=(*notes.texts, *choice.reasons))
    return AutoSplit(choice, costs, goals, least)
