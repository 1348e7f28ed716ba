"""Which models are loaded where, which make room, and how adapters come and go."""

import gc
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_server.models.catalog import State
from cloud_server.models.denoiser import Denoiser
from cloud_server.models.devices import place
from cloud_server.models.load import Model, ModelError, ModelSpec, load_model
from cloud_server.models.loading import LoadFailed
from cloud_server.models.loras import LoraSource
from cloud_server.models.registry import RETRY_S, ModelRegistry
from hybridsd.errors import HybridSDError, Reason
from hybridsd.prompting import TextOptions
from tests.support.engine_fakes import until
from tests.support.loading import QuickLoader, write_loras, write_models
from tests.support.patience import HANG_S

CPU, CPU0 = torch.device("cpu"), torch.device("cpu:0")
"""Two devices, as far as anybody can tell."""
Make = Callable[..., ModelRegistry]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("registry"), "a", "b", "c")


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: load_model(str(folder), place("cpu", "fp32")) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def size_bytes(folders: dict[str, Path]) -> int:
    return ModelSpec(source=str(folders["a"])).describe(torch.float32).size_bytes


@pytest.fixture
def loader() -> Iterator[QuickLoader]:
    quick = QuickLoader()
    yield quick
    quick.gate.set()


@pytest.fixture
def make(loader: QuickLoader, folders: dict[str, Path]) -> Iterator[Make]:
    """Makes registries that know models, all cold."""
    made: list[ModelRegistry] = []

    def make_(*names: str, devices: tuple[torch.device, ...] = (CPU,), **options: Any) -> ModelRegistry:
        registry = ModelRegistry(devices, loader=loader, clock=Clock(), **options)
        made.append(registry)
        for name in names:
            spec = ModelSpec(source=str(folders[name]))
            registry.know(spec, spec.describe(torch.float32))
        return registry

    yield make_
    for registry in made:
        registry.close()
        registry.join(HANG_S)


def output(denoiser: Denoiser, loras: tuple[tuple[str, float], ...] = ()) -> torch.Tensor:
    with torch.inference_mode():
        text = denoiser.encode("a fox", TextOptions(), loras)
        conditions = denoiser.conditions([text], size=(64, 64), guidance_scale=1.0)
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return denoiser.predict(sample, torch.tensor([500.0]), conditions, loras)


def found(registry: ModelRegistry, model: str, device: int = 0) -> Denoiser:
    denoiser = registry.denoiser(model, device)
    assert denoiser is not None
    return denoiser


def states(registry: ModelRegistry) -> dict[str, State]:
    return {view.id: view.state for view in registry.views()}


async def warm(registry: ModelRegistry, *names: str) -> None:
    for name in names:
        registry.want(name, 0)
        await until(lambda name=name: registry.denoiser(name, 0) is not None)


def end(future: Future[None]) -> None:
    future.result(HANG_S)


async def test_a_model_is_loaded_when_it_is_wanted(make: Make, models: dict[str, Model], loader: QuickLoader) -> None:
    """Wanting never waits, and twice is once; who listens is told; what is described before is what is loaded."""
    registry, told = make("a"), list[str]()
    registry.listen(lambda: told.append("changed"), lambda _device: set())
    before = registry.catalog["a"].info
    loader.gate.clear()
    assert registry.denoiser("a", 0) is None
    assert registry.load_s("a", 0) > 0
    registry.want("a", 0)
    registry.want("a", 0)
    assert states(registry) == {"a": State.LOADING}
    assert not told
    loader.gate.set()
    await until(lambda: bool(told))
    assert torch.equal(output(found(registry, "a")), output(models["a"].denoiser))
    loaded = registry.catalog["a"].info
    assert loaded == models["a"].info
    assert before == replace(loaded, text_encoder_digest=b"")  # which is of weights
    assert registry.catalog["a"].cost == models["a"].cost
    assert registry.load_s("a", 0) == 0.0
    assert len(loader.orders) == 1


async def test_the_least_recently_used_makes_room(make: Make, size_bytes: int) -> None:
    """Not one that a job needs; never is more held than the budget says."""
    registry, needed = make("a", "b", "c", budget_bytes=int(2.5 * size_bytes)), {"a"}
    registry.listen(lambda: None, lambda _device: needed)
    await warm(registry, "a", "b")
    found(registry, "b")  # used after a
    registry.want("c", 0)
    await until(lambda: states(registry)["c"] is State.WARM)
    assert states(registry) == {"a": State.WARM, "b": State.COLD, "c": State.WARM}
    needed |= {"c"}
    registry.want("b", 0)
    for _ in range(20):
        (memory,) = registry.memory()
        assert memory.used_bytes <= int(2.5 * size_bytes)
        assert states(registry)["b"] is State.LOADING
        await until(lambda: True)
    needed -= {"a"}
    await until(lambda: states(registry)["b"] is State.WARM)
    assert states(registry) == {"a": State.COLD, "b": State.WARM, "c": State.WARM}


async def test_no_job_moves_to_where_a_model_is_about_to_go(make: Make, size_bytes: int) -> None:
    """From before it is asked what jobs need, loading counts: else one would move there, and not find it."""
    registry, said = make("a", "b", budget_bytes=int(1.5 * size_bytes)), list[float]()
    await warm(registry, "a")

    def in_use(device: int) -> set[str]:
        said.append(registry.load_s("a", device))
        return {"a"} if len(said) < 3 else set()

    registry.listen(lambda: None, in_use)
    registry.want("b", 0)
    await until(lambda: len(said) > 1)
    assert all(said)
    await until(lambda: registry.load_s("a", 0) == 0.0 or len(said) > 2)
    await until(lambda: states(registry)["b"] is State.WARM)
    assert registry.load_s("a", 0) > 0


async def test_memory_counts_until_nobody_uses_it(make: Make, size_bytes: int) -> None:
    """A step that still runs with a model that was evicted holds its memory; the next is loaded when it is free."""
    registry = make("a", "b", budget_bytes=int(1.5 * size_bytes))
    await warm(registry, "a")
    running = found(registry, "a")
    registry.want("b", 0)
    await until(lambda: states(registry)["a"] is State.COLD)
    assert output(running).isfinite().all()
    assert states(registry)["b"] is State.LOADING
    assert registry.memory()[0].used_bytes >= size_bytes
    gc.disable()
    try:
        del running
        await until(lambda: states(registry)["b"] is State.WARM)
    finally:
        gc.enable()
    assert registry.memory()[0].used_bytes < int(1.5 * size_bytes)


async def test_one_that_waits_for_room_too_long_says_what_is_in_its_way(make: Make, size_bytes: int) -> None:
    """Its jobs hear it, with when to come again."""
    registry = make("a", "b", budget_bytes=int(1.5 * size_bytes))
    registry.listen(lambda: None, lambda _device: {"a"})
    await warm(registry, "a")
    registry.want("b", 0)
    registry._clock.now_s += 1e6  # type: ignore[attr-defined]
    await until(lambda: states(registry)["b"] is State.FAILED)
    error = registry.error("b", 0)
    assert error is not None
    assert error.reason is Reason.UNAVAILABLE
    assert error.retry_delay_s
    assert "jobs need a" in error.message


def test_what_can_never_fit_is_refused_with_numbers(make: Make, folders: dict[str, Path], size_bytes: int) -> None:
    """At the start as later; it is no model of the server then."""
    registry = make("a", budget_bytes=int(1.2 * size_bytes))
    large = ModelSpec(source=str(folders["b"]), loras=())
    assert registry.fits(size_bytes)
    registry._budget_bytes = size_bytes // 2
    with pytest.raises(ModelError, match=r"takes .* GiB, but --memory-budget is .* GiB"):
        registry.know(large, large.describe(torch.float32))
    (load,) = registry.load(large)
    with pytest.raises(ModelError, match="--memory-budget"):
        end(load)
    assert list(registry.catalog) == ["a"]
    assert states(registry) == {"a": State.COLD}


async def test_a_load_that_fails_is_no_more_than_an_error(
    make: Make, loader: QuickLoader, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """A new model is not known then; a known one is tried again after a while, not by each job.

    Operators hear why. Jobs do not: it may name files of the server.
    """
    registry = make("a")
    (load,) = registry.load(ModelSpec(source="new=/nowhere"))
    with pytest.raises(ModelError, match="neither a folder"):
        end(load)
    assert list(states(registry)) == ["a"]

    loader.errors += [LoadFailed("the process was killed"), RuntimeError("anything")]
    for says in ("the process was killed", "anything"):
        registry.want("a", 0)
        await until(lambda: states(registry)["a"] is State.FAILED)
        error = registry.error("a", 0)
        assert error is not None
        assert error.reason is Reason.UNAVAILABLE
        (view,) = registry.views()
        assert says in view.devices[0].error
        assert says not in error.message
        assert "model a could not be loaded" in error.message
        registry.want("a", 0)
        assert states(registry)["a"] is State.FAILED
        registry._clock.now_s += RETRY_S  # type: ignore[attr-defined]
        assert registry.error("a", 0) is None  # who asks now, wants it again
    registry.want("a", 0)
    assert registry.error("a", 0) is None
    await until(lambda: states(registry)["a"] is State.WARM)

    gone = tmp_path / "gone"
    shutil.copytree(folders["b"], gone)
    spec = ModelSpec(source=str(gone))
    registry.know(spec, spec.describe(torch.float32))
    shutil.rmtree(gone)
    registry.want("gone", 0)
    await until(lambda: states(registry)["gone"] is State.FAILED)


async def test_an_adapter_that_waits_for_a_model_that_goes_is_given_up(make: Make, tmp_path: Path) -> None:
    """It does not have the model loaded again and again."""
    registry = make("a", "b")
    registry._budget_bytes = 1  # so that it waits for room
    file = tmp_path / "x.safetensors"
    file.touch()
    load = registry.add_lora("a", LoraSource("x", str(file)))
    end(registry.unload("a"))
    with pytest.raises(HybridSDError) as caught:
        load.result(HANG_S)
    assert caught.value.reason is Reason.CANCELLED
    assert list(states(registry)) == ["b"]


async def test_a_load_can_be_given_up(make: Make, loader: QuickLoader, folders: dict[str, Path]) -> None:
    """By unloading it; who waits for it hears so."""
    registry = make("a")
    loader.gate.clear()
    (load,) = registry.load(ModelSpec(source=str(folders["b"])))
    assert loader.described.acquire(timeout=HANG_S)
    end(registry.unload("b"))
    with pytest.raises(HybridSDError, match="given up"):
        end(load)
    assert list(states(registry)) == ["a"]
    (again,) = registry.load(ModelSpec(source=str(folders["b"])))
    loader.gate.set()
    end(again)
    assert list(registry.catalog) == ["a", "b"]


async def test_a_long_load_does_not_hold_up_another(make: Make, loader: QuickLoader, folders: dict[str, Path]) -> None:
    """As of a model that is downloaded, while a job waits for one that is there."""
    registry = make("a")
    loader.gated = "b"
    loader.gate.clear()
    (load,) = registry.load(ModelSpec(source=str(folders["b"])))
    assert loader.described.acquire(timeout=HANG_S)
    await warm(registry, "a")
    assert states(registry) == {"a": State.WARM, "b": State.LOADING}
    loader.gate.set()
    end(load)


async def test_two_loads_at_a_time_keep_to_the_budget(make: Make, loader: QuickLoader, size_bytes: int) -> None:
    """What one is about to take is not there for the other."""
    registry = make("a", "b", budget_bytes=int(1.5 * size_bytes))
    loader.gate.clear()
    registry.want("a", 0)
    assert loader.described.acquire(timeout=HANG_S)
    registry.want("b", 0)
    loader.gate.set()
    await until(lambda: states(registry)["b"] is State.WARM)
    assert states(registry) == {"a": State.COLD, "b": State.WARM}
    assert registry.memory()[0].used_bytes <= int(1.5 * size_bytes)


async def test_a_model_is_unloaded_after_its_jobs(make: Make, folders: dict[str, Path]) -> None:
    """At once where none needs it; refused where one does, unless it is to be waited for; the only one stays."""
    registry, needed = make("a", "b"), {"a"}
    registry.listen(lambda: None, lambda _device: set(needed))
    await warm(registry, "a", "b")
    with pytest.raises(HybridSDError) as refused:
        registry.unload("a")
    assert refused.value.reason is Reason.MODEL_IN_USE
    unloading = registry.unload("a", drain=True)
    assert list(registry.catalog) == ["b"]
    assert registry.catalog.default.info.id == "b"
    assert registry.denoiser("a", 0) is not None  # its jobs go on
    with pytest.raises(HybridSDError) as refused:
        registry.load(ModelSpec(source=str(folders["a"])))
    assert refused.value.reason is Reason.MODEL_IN_USE
    needed.clear()
    end(unloading)
    assert registry.denoiser("a", 0) is None
    unknown = registry.error("a", 0)
    assert unknown is not None
    assert unknown.reason is Reason.MODEL_UNKNOWN
    for model, reason in (("b", Reason.FIELD_INVALID), ("a", Reason.MODEL_UNKNOWN)):
        with pytest.raises(HybridSDError) as refused:
            registry.unload(model)
        assert refused.value.reason is reason
    end(registry.unload("b", keep=True))
    assert states(registry) == {"b": State.COLD}
    await warm(registry, "b")
    await until(lambda: registry.memory()[0].used_bytes == registry.catalog["b"].size_bytes)


async def test_two_workers_of_a_device_share_memory_and_two_devices_do_not(
    make: Make, loader: QuickLoader, models: dict[str, Model], size_bytes: int
) -> None:
    """Each worker has modules of its own. A second device takes what the first has, and reads no file."""
    registry = make("a", devices=(CPU, CPU, CPU0))
    for load in registry.reload("a"):
        end(load)
    one, two, other = (found(registry, "a", device) for device in range(3))
    assert len({id(one), id(two), id(other)}) == 3
    assert one._unet.conv_in.weight.data_ptr() == two._unet.conv_in.weight.data_ptr()  # type: ignore[attr-defined]
    assert other.device == CPU0
    assert len(loader.orders) == 1
    assert {memory.device: memory.used_bytes for memory in registry.memory()} == dict.fromkeys(
        (CPU, CPU0), registry.catalog["a"].size_bytes
    )
    for denoiser in (one, two, other):
        assert torch.equal(output(denoiser), output(models["a"].denoiser))


async def test_a_model_of_this_process_is_taken_as_it_is(folders: dict[str, Path], make: Make) -> None:
    """As at the start of a server: onto all workers, and it may make room for others like any."""
    spec = ModelSpec(source=str(folders["a"]))
    registry = make(devices=(CPU, CPU))
    registry.adopt(spec.load(place("cpu", "fp32")), spec)
    assert states(registry) == {"a": State.WARM}
    assert found(registry, "a", 0) is not found(registry, "a", 1)
    size = registry.catalog["a"].size_bytes
    assert registry.memory()[0].used_bytes == size
    gc.disable()
    try:
        end(registry.unload("a", keep=True))
        await until(lambda: registry.memory()[0].used_bytes == 0)
    finally:
        gc.enable()


async def test_an_adapter_comes_without_a_pause_for_running_jobs(
    make: Make, models: dict[str, Model], tmp_path: Path
) -> None:
    """The model is replaced by one that shares its weights; who has the old one goes on with it."""
    registry = make("a", devices=(CPU, CPU))
    await warm(registry, "a")
    before, path = found(registry, "a"), write_loras(tmp_path, models["a"], "style")["style"]
    version = before.version  # type: ignore[attr-defined]
    used = registry.memory()[0].used_bytes
    end(registry.add_lora("a", LoraSource("style", str(path))))
    after = found(registry, "a")
    assert after is not before
    assert after.version != version  # type: ignore[attr-defined]
    assert torch.equal(output(before), output(after))
    assert torch.equal(output(before), output(models["a"].denoiser))
    assert not torch.equal(output(after, (("style", 1.0),)), output(after))
    (info,) = registry.catalog["a"].info.loras
    assert registry.memory()[0].used_bytes == used + 4 * info.num_parameters
    with pytest.raises(HybridSDError, match="was unloaded"):
        output(before, (("style", 1.0),))


async def test_content_is_another_where_anything_is(
    make: Make, folders: dict[str, Path], models: dict[str, Model], tmp_path: Path
) -> None:
    """The same while a model is the same, loaded or evicted; never again what it was under another model of its id."""
    registry = make("a", "c")
    unknown = registry.content("a")
    await warm(registry, "a")
    first = registry.content("a")
    assert first == registry.content("a") != unknown
    path = write_loras(tmp_path, models["a"], "style")["style"]
    end(registry.add_lora("a", LoraSource("style", str(path))))
    second = registry.content("a")
    assert second != first
    end(registry.unload("a"))
    (loaded,) = registry.load(ModelSpec(source=f"a={folders['b']}"))
    end(loaded)
    assert registry.content("a") not in (unknown, first, second)


async def test_adapters_belong_to_tokens(make: Make, models: dict[str, Model], tmp_path: Path) -> None:
    """Two of one name are two; one that is unloaded is gone for askers at once, and its memory when nobody needs it."""
    registry, needed = make("a"), set[str]()
    registry.listen(lambda: None, lambda _device: set(needed))
    paths = write_loras(tmp_path, models["a"], "one", "two", "three")
    for name, owner in (("one", "alice"), ("two", "bob"), ("three", "")):
        end(registry.add_lora("a", LoraSource("style", str(paths[name]), owner=owner)))
    expected = {}
    for key, name in (("alice/style", "one"), ("bob/style", "two"), ("style", "three")):
        alone = load_model(
            str(registry.views()[0].source), place("cpu", "fp32"), loras=[LoraSource("s", str(paths[name]))]
        )
        expected[key] = output(alone.denoiser, (("s", 0.5),))
        assert torch.equal(output(found(registry, "a"), ((key, 0.5),)), expected[key])
    with pytest.raises(HybridSDError, match="already"):
        registry.add_lora("a", LoraSource("style", str(paths["one"]), owner="bob"))

    needed.add("a")
    registry.remove_lora("a", "style", "bob")
    assert [info.key for info in registry.catalog["a"].info.loras] == ["alice/style", "style"]
    assert torch.equal(output(found(registry, "a"), (("bob/style", 0.5),)), expected["bob/style"])  # a job goes on
    with pytest.raises(HybridSDError) as refused:
        registry.add_lora("a", LoraSource("style", str(paths["one"]), owner="bob"))
    assert refused.value.reason is Reason.MODEL_IN_USE
    used = registry.memory()[0].used_bytes
    needed.clear()
    await until(lambda: registry.memory()[0].used_bytes < used)
    with pytest.raises(HybridSDError, match="was unloaded"):
        output(found(registry, "a"), (("bob/style", 0.5),))
    assert torch.equal(output(found(registry, "a"), (("style", 0.5),)), expected["style"])
    with pytest.raises(HybridSDError) as refused:
        registry.remove_lora("a", "style", "bob")
    assert refused.value.reason is Reason.LORA_UNKNOWN

    end(registry.unload("a", keep=True))
    await warm(registry, "a")  # with the adapters that are left
    assert torch.equal(output(found(registry, "a"), (("alice/style", 0.5),)), expected["alice/style"])


def test_a_wrong_adapter_leaves_the_model_as_it_is(make: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    """Whether its file is not there, or is something else."""
    registry = make("a")
    with pytest.raises(ModelError, match="neither a file"):
        registry.add_lora("a", LoraSource("style", str(tmp_path / "nowhere")))
    weights = folders["b"] / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match=r"cannot be used|does not fit"):
        end(registry.add_lora("a", LoraSource("style", str(weights))))
    assert not registry.catalog["a"].info.loras
    assert output(found(registry, "a")).isfinite().all()


def test_an_end_of_the_server_ends_what_waits(make: Make, loader: QuickLoader) -> None:
    """What is being loaded is given up."""
    registry = make("a")
    loader.gate.clear()
    (load,) = registry.reload("a")
    assert loader.described.acquire(timeout=HANG_S)
    registry.close()
    with pytest.raises(HybridSDError):
        end(load)
