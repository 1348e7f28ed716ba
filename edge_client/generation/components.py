"""What an image is made with, and which of it runs a stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.pool import Pool
from edge_client.cloud.types import CLOUD_FAILURES
from edge_client.inference.models import Models
from edge_client.request import Resolved, Stage, TimestepSchedule
from hybridsd.errors import Reason
from hybridsd.plan import Plan


@dataclass(kw_only=True, slots=True)
class Components:
    """The edge's models and plans, and the clouds."""

    bundle: Bundle
    models: Models
    others: Mapping[str, Models]
    """More edge models, by the name that a segment gives."""
    cloud: Pool | None
    cloud_guidance: dict[str, str] = field(default_factory=dict)
    """How each model of the cloud takes guidance, where that was asked; "" is its first."""

    def check(self, resolved: Resolved) -> None:
        """Refuses stages that their models cannot run, before anything is begun."""
        request = resolved.request
        if request.safety != "off" and not self.models.has_safety_checker:
            raise Reason.FIELD_INVALID.error(
                f"bundle {self.bundle.manifest.name} has no safety checker; set `safety` to off, or export the "
                "bundle with one",
                field="safety_checker",
            )
        in_cloud = [stage for stage in resolved.stages if stage.place == "cloud"]
        if in_cloud and (request.segments or (request.private and in_cloud[0].schedule.scheduler == "lcm")):
            self._ask_cloud()
        for stage in resolved.stages:
            if self.guidance(stage) == "embedded" and stage.schedule.scheduler != "lcm":
                raise Reason.SPLIT_INVALID.error(
                    f"{stage.model or stage.place + ' model'} is a consistency model, whose output scheduler "
                    f"{stage.schedule.scheduler} cannot use; set `scheduler` to lcm, or give its segment a timestep "
                    "schedule of its own, as in (scheduler=lcm,steps=8)",
                    field="segments",
                )
        if request.negative_prompt and resolved.stages and not any(map(self.takes_negative, resolved.stages)):
            raise Reason.GUIDANCE_INVALID.error(
                "no model of this image takes a negative prompt: consistency models have guidance as an input, and "
                "without guidance there is nothing to draw away from; leave the negative prompt out",
                field="negative_prompt",
            )
        rescaled = [stage for stage in resolved.stages if stage.guidance_rescale]
        if rescaled and not any(map(self.takes_negative, rescaled)):
            raise Reason.GUIDANCE_INVALID.error(
                "no model of this image computes guidance: consistency models have it as an input; leave "
                "`guidance_rescale` out",
                field="guidance_rescale",
            )

    def bundle_plan(self, schedule: TimestepSchedule) -> Plan | None:
        """Returns the bundle's own plan of a schedule; None where it has none."""
        return self.bundle.find_plan(schedule.scheduler, schedule.num_inference_steps, schedule.begin_step)

    def edge_models(self, stage: Stage) -> Models:
        """Returns the edge models that a stage names."""
        if not self.others or stage.model in ("", self.models.manifest.name):
            return self.models  # with one bundle the name in a segment is free
        if stage.model not in self.others:
            raise Reason.MODEL_UNKNOWN.error(
                f"there is no edge model {stage.model[:64]!r}; choose one of "
                f"{', '.join((self.models.manifest.name, *self.others))}",
                field="segments",
            )
        return self.others[stage.model]

    def guidance(self, stage: Stage) -> str:
        """Returns how a stage's model takes guidance: "cfg", or "embedded" as an input."""
        if stage.place == "cloud":
            return self.cloud_guidance.get(stage.model, "cfg")
        return self.edge_models(stage).manifest.guidance

    def takes_negative(self, stage: Stage) -> bool:
        """Returns whether a negative prompt has an effect on a stage."""
        return self.guidance(stage) != "embedded" and stage.guidance_scale > 1

    def _ask_cloud(self) -> None:
        if self.cloud is None or self.cloud.away is not None:
            return
        try:
            models = self.cloud.models()
        except CLOUD_FAILURES:
            return  # it fails again when its segment begins, and there the edge takes over
        self.cloud_guidance = {model.id: model.guidance for model in models}
        self.cloud_guidance[""] = models[0].guidance if models else "cfg"
