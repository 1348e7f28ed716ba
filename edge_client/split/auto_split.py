"""An automatic split: measures this device and the cloud, and lets the policy choose."""

import time
from dataclasses import dataclass, replace

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.inference.models import Models
from edge_client.request import Resolved
from edge_client.split.cost_model import Costs, curve_of
from edge_client.split.handoff_policy import Advisor, Choice, Goals, choose
from edge_client.split.measure import measure


@dataclass(frozen=True, slots=True)
class AutoSplit:
    """A chosen split, and what watches over it."""

    choice: Choice
    costs: Costs
    goals: Goals

    def advisor(self, resolved: Resolved, bundle: Bundle) -> Advisor:
        """Returns what reconsiders the split while the cloud works; its clock begins now."""
        return Advisor(
            num_steps=resolved.num_inference_steps, planned=self.choice.cloud_steps, costs=self.costs, goals=self.goals,
            curve=curve_of(bundle.manifest.quality), began_s=time.perf_counter(),
        )  # fmt: skip


def choose_split(resolved: Resolved, goals: Goals, bundle: Bundle, models: Models, cloud: Pool | Cloud) -> AutoSplit:
    """Returns the split for a request: this device is timed on one step and one decode, the cloud asked."""
    costs, notes = measure(resolved, bundle, models, cloud)
    goals_now = replace(goals, max_cloud_steps=0) if notes.is_away else goals
    choice = choose(resolved.num_inference_steps, costs, goals_now, curve_of(bundle.manifest.quality))
    choice = replace(choice, reasons=(*notes.texts, *choice.reasons))
    return AutoSplit(choice, costs, goals)
