"""Names of schedulers: what they mean, what means the same, what is refused."""

import diffusers
import pytest
import torch

from hybridsd.errors import InvalidRequest, Reason
from hybridsd.plan_compiler import compile_named, compile_plan
from hybridsd.schedulers import AYS, SCHEDULERS, SIGMAS, SPACINGS, find, make, timesteps_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_every_old_name_is_still_there() -> None:
    """Names of earlier versions, of which bundles have plans, mean what they meant."""
    old = (
        "ddim ddpm dpmpp_2m dpmpp_2m_karras dpmpp_3m dpmpp_2m_sde dpmpp_2s euler euler_ancestral heun pndm lms deis"
        " unipc lcm tcd"
    )
    assert [find(name).name for name in old.split()] == old.split()


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++ 2m sde karras", "dpmpp_2m_sde_karras"),
        ("dpmpp_2m+karras", "dpmpp_2m_karras"),
        ("dpmpp_2m_karras+beta", "dpmpp_2m+beta"),
        ("dpmpp_2m+order=3", "dpmpp_3m"),
        ("dpmpp_2m_karras+order=3", "dpmpp_3m+karras"),
        ("heun_karras", "heun+karras"),
        ("Heun Exponential", "heun+exponential"),
        ("DPM++ SDE Karras", "dpmpp_sde_karras"),
        ("DPM2 a", "kdpm2_a"),
        ("Euler SGM Uniform", "euler+trailing"),
        ("DPM++ 2M Align Your Steps", "dpmpp_2m+ays"),
        ("euler+trailing+karras", "euler_karras+trailing"),
        ("ddim+eta=0", "ddim"),
        ("ddim+eta=0.50", "ddim+eta=0.5"),
        ("tcd+eta=0.3", "tcd+eta=0.3"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("own", "own"),
        ("EulerAncestralDiscreteScheduler+trailing", "euler_ancestral+trailing"),
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde_heun+karras"),
        ("dpmpp_2m_sde_gpu karras", "dpmpp_2m_sde_karras"),
        ("dpm_2_ancestral", "kdpm2_a"),
        ("uni_pc_bh2 sgm_uniform", "unipc+trailing"),
        ("euler_sgm_uniform", "euler+trailing"),
        ("Euler a SGM Uniform", "euler_ancestral+trailing"),
        ("DPM++ 2M DDIM uniform", "dpmpp_2m+leading"),
        ("DPM++ 2M KL Optimal", "dpmpp_2m+kl_optimal"),
        ("dpmpp_2m+align_your_steps", "dpmpp_2m+ays"),
        ("DPM++ 2M Automatic", "dpmpp_2m"),
        ("Heun Normal", "heun"),
        ("Euler Polyexponential", "euler+exponential"),
        ("euler+sigmas=14.60-6.5-0.4-0", "euler+sigmas=14.6-6.5-0.4"),
        ("tcd+timesteps=800+eta=1", "tcd+eta=1+timesteps=800"),
        ("heun+zero_snr+trailing", "heun+trailing+zero_snr"),
    ],
)
def test_what_means_the_same_has_one_name(written: str, name: str) -> None:
    """Whoever asks by another tool's words gets the same plan from the same place."""
    assert find(written).name == name
    assert find(find(written).label).name == name


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("magic", "choose one of ddim"),
        ("ddim+karras", "choose eta=, leading, linspace, trailing"),
        ("Euler a Karras", "'karras'"),
        ("lcm+trailing", "'trailing'"),
        ("own+karras", "takes none"),
        ("euler+sharp", "'sharp'; choose karras, exponential, beta"),
        ("ddim+eta=2", "eta=0 to eta=1"),
        ("unipc+order=9", "order=1, order=2"),
        ("euler_karras+ays", "either noise levels or timesteps"),
        ("euler+karras+beta", "'karras' is of the same kind; give one of them"),
        ("ddim+eta=0.5+eta=1", "'eta=0.5' is of the same kind"),
        ("euler+timesteps=1-2", "falling numbers of 0 to 999"),
        ("euler+timesteps=", "give timesteps"),
        ("euler+", "''"),
        ("+" * 2000, "unknown"),
        ("DPM fast", "diffusers does not have; choose dpmpp_2m"),
        ("DPM++ 2S a Karras", "choose dpmpp_2s or euler_ancestral"),
        ("Restart", "choose dpmpp_2m_sde"),
        ("euler+sigmas=1-2", "falling numbers above 0"),
        ("euler+sigmas=nan", "falling numbers above 0"),
        ("euler+sigmas=", "give noise levels"),
        ("euler_ancestral+sigmas=14-2", "choose leading, linspace, trailing"),
        ("deis+sigmas=14-2", "stays at the last level"),
        ("euler+kl_optimal+ays", "either noise levels or timesteps"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(written: str, says: str) -> None:
    """Never ignored: another modifier, or another scheduler, is named."""
    with pytest.raises(InvalidRequest) as refused:
        find(written)
    assert refused.value.reason is Reason.SCHEDULER_UNKNOWN
    assert says in refused.value.message
    assert len(refused.value.message) < 600


@pytest.mark.parametrize("spec", SCHEDULERS, ids=lambda spec: spec.name)
def test_what_is_offered_reaches_the_scheduler(spec: object) -> None:
    """Every noise schedule and spacing that a row offers is an option of its diffusers class, and is set."""
    for sigmas in spec.sigmas:  # type: ignore[attr-defined]
        made = make(diffusers, BETAS, find(f"{spec.name}+{sigmas}"))  # type: ignore[attr-defined]
        assert [name for name in SIGMAS if made.config[f"use_{name}_sigmas"]] == [sigmas]
    for spacing in SPACINGS if "spacing" in spec.takes else ():  # type: ignore[attr-defined]
        made = make(diffusers, BETAS, find(f"{spec.name}+{spacing}"))  # type: ignore[attr-defined]
        assert made.config["timestep_spacing"] == spacing


@pytest.mark.parametrize("name", AYS)
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 25, 60])
def test_aligned_steps_are_interpolated(name: str, steps: int) -> None:
    """Ten steps are the paper's; others fall strictly from its first to its last."""
    spec = find(f"dpmpp_2m+{name}")
    chosen = timesteps_of(spec, steps)
    assert chosen is not None
    found = list(chosen(make(diffusers, BETAS, spec)))

    assert len(found) == steps
    assert found == sorted(set(found), reverse=True)
    assert min(found) >= 0
    assert found[0] == 999
    if steps == 10:
        assert tuple(found) == tuple(AYS[name])


@pytest.mark.parametrize("name", ["lcm", "tcd", "ddpm"])
def test_aligned_steps_begin_at_pure_noise(name: str) -> None:
    """Of a model whose noise levels end there, too, where their logarithm is infinite."""
    base = {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    plan = compile_named(diffusers, base, f"{name}+ays", 4, torch.from_numpy)

    assert plan.rows[0].timestep == 999
    assert len(plan.rows) == 4


def test_own_sigmas_are_as_many_as_there_are_steps() -> None:
    """Otherwise the number that they are is said."""
    with pytest.raises(InvalidRequest, match=r"2 noise levels of its own.*set `steps` to 2"):
        compile_named(diffusers, BETAS, "dpmpp_2m+sigmas=14-2", 4, torch.from_numpy)


def test_own_timesteps_are_as_many_as_there_are_steps() -> None:
    """Otherwise the number that they are is said."""
    with pytest.raises(InvalidRequest, match="set `steps` to 3"):
        timesteps_of(find("euler+timesteps=900-500-100"), 4)


@pytest.mark.parametrize("name", ["dpmpp_2m+ays", "euler+timesteps=999-700-400-200-100-50-40-30-20-10", "tcd+ays"])
def test_own_timesteps_can_be_begun_late(name: str) -> None:
    """For an image to begin with, as any other plan."""
    whole, late = (
        compile_named(diffusers, BETAS, name, 10, torch.from_numpy, begin_step=begin) for begin in (0, 4)
    )  # fmt: skip

    assert [row.timestep for row in late.rows] == [row.timestep for row in whole.rows[4:]]


def test_timesteps_that_a_scheduler_refuses_are_said_to_be_that() -> None:
    """And not a number of steps."""
    scheduler = make(diffusers, BETAS | {"num_train_timesteps": 500}, find("euler"))
    with pytest.raises(InvalidRequest, match="refuses its timesteps"):
        compile_plan(scheduler, 2, torch.from_numpy, timesteps=lambda _scheduler: (999, "x"))  # type: ignore[arg-type, return-value]
