"""The models that a server knows, on which of its devices they are loaded, and which make room for others.

Threads of its own do all that takes a while; what the engine asks is answered from what is there. A denoiser is never
changed, only replaced. Knows nothing of jobs or the network.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog
import torch

from cloud_server.metrics import Metrics
from cloud_server.models.catalog import Catalog, Memory, OnDevice, State, View
from cloud_server.models.denoiser import Denoiser, DiffusersDenoiser
from cloud_server.models.handover import Bin, Pace, Skeleton, Weights, pack, to_device, unpack
from cloud_server.models.load import Description, Model, ModelError, ModelSpec
from cloud_server.models.loading import NICE, AdapterOrder, LoadCancelled, Loaded, Loader, LoadFailed, LoadOrder, Order
from cloud_server.models.loras import LoraSource, check_sources
from cloud_server.models.loras import describe as describe_lora
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

TICK_S = 0.1
"""How often a load that waits for room looks again."""
ROOM_S = 300.0
"""For how long a load waits for room: until jobs of others have ended, and their memory is free."""
MAX_THREADS = 2
"""Models that are loaded at a time: one that is downloaded does not hold up one that jobs wait for."""
RETRY_S = 10.0
"""After a load that failed, until a job's wish begins another."""
FIRST_LOAD_S, BYTES_PER_S = 10.0, 3e8
"""What a load is thought to take before one was measured."""
GIB = 2**30


class Runs(Protocol):
    """What carries out orders; `Loader` is it."""

    def run(
        self,
        order: Order,
        *,
        is_wanted: Callable[[], bool] = ...,
        on_described: Callable[[Description], bool] = ...,
    ) -> Loaded | None:
        """See `Loader`."""
        ...


@dataclass(eq=False, slots=True)
class _Held:
    """A model on a device."""

    weights: tuple[Weights, ...]
    denoisers: dict[int, Denoiser]
    """By number of the worker: one that runs adapters is for one thread of steps."""
    last_use_s: float

    @property
    def size_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.weights)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a model was not loaded on a device."""

    message: str
    """For operators: it may name files."""
    error: HybridSDError
    """For whoever asked for the model."""
    since_s: float


@dataclass(eq=False, slots=True)
class _Entry:
    """A model that is known."""

    id: str
    spec: ModelSpec | None
    description: Description | None = None
    skeleton: Skeleton[Model] | None = None
    """Of what is held; None where that is not ours to take apart."""
    held: dict[torch.device, _Held] = field(default_factory=dict)
    loading: dict[torch.device, _Task] = field(default_factory=dict)
    errors: dict[torch.device, _Failure] = field(default_factory=dict)
    closed: set[torch.device] = field(default_factory=set)
    """Devices where it may be evicted at once: jobs that move there would not find it."""
    hidden: set[str] = field(default_factory=set)
    """Adapters that are still in the networks, but cannot be asked for."""
    load_s: float | None = None
    is_new: bool = False
    """Whether it never was loaded: it is no model of ours if it cannot be."""
    is_leaving: bool = False
    number: int = field(default_factory=itertools.count().__next__)
    """Another one for each model that was ever known here."""
    version: str = ""
    """Of what was loaded last."""


@dataclass(eq=False, slots=True)
class _Task:
    """Something for a thread to do, again and again until it is done."""

    entry: _Entry
    attempt: Callable[[_Task], bool]
    """Returns whether it is done; raises why it never will be."""
    until_s: float
    device: torch.device | None = None
    done: Future[None] = field(default_factory=Future)
    retry_s: float = 0.0
    reserved: dict[torch.device, int] = field(default_factory=dict)
    """Bytes that it is about to take."""
    waits_for: str = ""
    """For the message when it has waited too long."""


class ModelRegistry:
    """The models of a server; `ServedModels` for the engine. Nothing waits but what returns a future."""

    def __init__(
        self,
        devices: Sequence[torch.device],
        *,
        dtype: torch.dtype = torch.float32,
        budget_bytes: int | None = None,
        max_size: int | None = None,
        loader: Runs | None = None,
        load_nice: int = NICE,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Knows no models at first.

        Args:
            devices: A worker's each; one may be there twice.
            dtype: Of U-Nets.
            budget_bytes: What models may take of each device; None: all.
            max_size: Largest width and height of images, which no model may exceed with its smallest; None: any.
            loader: What loads; None: processes of their own.
            load_nice: How nice these are.
            metrics: What counts loads and evictions.
            clock: Seconds, for tests.
        """
        self.catalog = Catalog()
        self._devices, self._dtype, self._budget_bytes, self._max_size = list(devices), dtype, budget_bytes, max_size
        self._metrics, self._clock = Metrics() if metrics is None else metrics, clock
        self._bin = Bin()
        self._loader: Runs = Loader(self._bin, nice=load_nice) if loader is None else loader
        self._on_change: Callable[[], None] = lambda: None
        self._in_use: Callable[[int], set[str]] = lambda _device: set()
        self._needed: Callable[[], set[str]] = set
        self._changed = threading.Condition()  # guards what follows
        self._entries: dict[str, _Entry] = {}
        self._denoisers: dict[tuple[str, int], Denoiser] = {}  # read without it
        self._alive_bytes = dict.fromkeys(devices, 0)
        """Of weights that are not free yet, held or not."""
        self._tasks: list[_Task] = []
        self._busy: set[_Entry] = set()
        """What a thread is at; no other one touches it."""
        self._threads: list[threading.Thread] = []
        self._is_closing = False

    @classmethod
    def of(cls, models: Mapping[str, Model]) -> ModelRegistry:
        """Returns models that are loaded, as they are, on one device: they stay so until they are unloaded."""
        registry = cls([next(iter(models.values())).denoiser.device])
        for model in models.values():
            registry.adopt(model, None)
        return registry

    # What the engine asks.

    @property
    def devices(self) -> Sequence[torch.device]:
        """See `ServedModels`."""
        return self._devices

    def denoiser(self, model: str, device: int) -> Denoiser | None:
        """See `ServedModels`."""
        found = self._denoisers.get((model, device))
        entry = self._entries.get(model)
        held = None if entry is None else entry.held.get(self._devices[device])
        if held is not None:
            held.last_use_s = self._clock()
        return found

    def content(self, model: str) -> Hashable:
        """See `ServedModels`: of a model that is evicted, what was loaded last."""
        with self._changed:
            entry = self._entries.get(model)
            if entry is None:
                return None
            for held in entry.held.values():
                entry.version = getattr(next(iter(held.denoisers.values())), "version", "")
            return (entry.number, entry.version)

    def load_s(self, model: str, device: int) -> float:
        """See `ServedModels`."""
        entry = self._entries.get(model)
        if entry is None or ((model, device) in self._denoisers and self._devices[device] not in entry.closed):
            return 0.0
        size_bytes = 0 if entry.description is None else entry.description.size_bytes
        return entry.load_s or FIRST_LOAD_S + size_bytes / BYTES_PER_S

    def want(self, model: str, device: int) -> None:
        """See `ServedModels`; see `error`."""
        with self._changed:
            entry = self._entries.get(model)
            if entry is not None:
                failure = entry.errors.get(self._devices[device])
                if failure is None or self._clock() - failure.since_s >= RETRY_S:
                    self._begin(entry, self._devices[device])

    def error(self, model: str, device: int) -> HybridSDError | None:
        """See `ServedModels`; for some time after a load has failed, so that not each job begins another."""
        with self._changed:
            entry = self._entries.get(model)
            if entry is None:
                return _unknown(model, self.catalog)
            failure = entry.errors.get(self._devices[device])
            return failure.error if failure is not None and self._clock() - failure.since_s < RETRY_S else None

    def listen(self, on_change: Callable[[], None], in_use: Callable[[int], set[str]]) -> None:
        """See `ServedModels`."""
        self._on_change, self._in_use = on_change, in_use

    def watch_jobs(self, needed: Callable[[], set[str]]) -> None:
        """Takes what says which models jobs need, those that wait included: none of these is unloaded."""
        self._needed = needed

    # What a server asks at its start.

    def fits(self, size_bytes: int) -> bool:
        """Whether a model more has room on each device beside what is there."""
        return self._budget_bytes is None or all(
            self._kept_bytes(device) + size_bytes <= self._budget_bytes for device in self._alive_bytes
        )

    def adopt(self, model: Model, spec: ModelSpec | None) -> None:
        """Takes a model that was loaded in this process, onto all devices.

        Args:
            model: The model; with a `spec` its denoiser is not to be used otherwise.
            spec: How to load it again; None: it stays loaded as it is.
        """
        entry = _Entry(model.info.id, spec)
        description = Description(model.info, model.plans, 0, model.cost)
        if spec is None or not isinstance(model.denoiser, DiffusersDenoiser):
            for device in self._alive_bytes:
                workers = [index for index, other in enumerate(self._devices) if other == device]
                entry.held[device] = _Held((), dict.fromkeys(workers, model.denoiser), self._clock())
        else:
            entry.skeleton, tensors = pack(model)
            here, source = model.denoiser.device, dict[int, torch.Tensor](tensors)
            for device in self._alive_bytes:
                placed = source if device == here else to_device(source, device)
                entry.held[device], _ = self._make(entry.skeleton, (self._weigh(placed, device),), device, Pace(1.0))
            description = replace(description, size_bytes=sum(tensor.nbytes for tensor in tensors.values()))
        entry.description = description
        with self._changed:
            self._entries[entry.id] = entry
            self._publish(entry)

    def know(self, spec: ModelSpec, description: Description) -> None:
        """Takes a model that is loaded when a job needs it."""
        self._check_fits(description)
        with self._changed:
            self._entries[spec.id] = _Entry(spec.id, spec, description)
            self._publish(self._entries[spec.id])

    # What an operator asks.

    def dtype_of(self, model: str, device: torch.device) -> torch.dtype:
        """Returns the precision of a model's U-Net on a device."""
        with self._changed:
            entry = self._entries.get(model)
            held = None if entry is None else entry.held.get(device)
            return self._dtype if held is None else next(iter(held.denoisers.values())).dtype

    def views(self) -> list[View]:
        """Returns all models, the default first."""
        with self._changed:
            return [self._view(entry) for entry in self._entries.values()]

    def memory(self) -> list[Memory]:
        """Returns what models take of each device."""
        with self._changed:
            return [Memory(device, used, self._budget_bytes) for device, used in self._alive_bytes.items()]

    def load(self, spec: ModelSpec) -> list[Future[None]]:
        """Loads a model on all devices, one that is not known included.

        Returns:
            What ends when it is loaded, a device each. They raise ModelError where the model is at fault, or
            HybridSDError.

        Raises:
            HybridSDError: FIELD_INVALID where another model has its id; MODEL_IN_USE where one is leaving.
        """
        with self._changed:
            entry = self._entries.get(spec.id)
            if entry is not None and entry.is_leaving:
                raise Reason.MODEL_IN_USE.error(f"model {spec.id} is being unloaded; load it when it is gone")
            if entry is None:
                entry = self._entries[spec.id] = _Entry(spec.id, spec, is_new=True)
            elif entry.spec is None or replace(spec, loras=()) != replace(entry.spec, loras=()):
                raise Reason.FIELD_INVALID.error(
                    f"model {spec.id} is served from elsewhere; unload it first, or choose another `id`", field="id"
                )
            return [self._begin(entry, device) for device in self._alive_bytes]

    def reload(self, model: str) -> list[Future[None]]:
        """Loads a model that is known on all devices; see `load`.

        Raises:
            HybridSDError: MODEL_UNKNOWN.
        """
        with self._changed:
            return [self._begin(self._find(model), device) for device in self._alive_bytes]

    def unload(self, model: str, *, drain: bool = False, keep: bool = False) -> Future[None]:
        """Lets go of a model, when its jobs have ended.

        Args:
            model: Its id.
            drain: Whether to wait for jobs. Meanwhile it cannot be asked for, unless it is kept.
            keep: Whether it stays known, and is loaded again when a job needs it.

        Raises:
            HybridSDError: MODEL_UNKNOWN; MODEL_IN_USE where jobs need it and nobody is to wait; FIELD_INVALID where it
                is the only one, or cannot be loaded again.
        """
        with self._changed:
            entry = self._find(model)
        is_used = self._is_needed(entry)
        with self._changed:
            entry = self._find(model)
            if keep and entry.spec is None:
                raise Reason.FIELD_INVALID.error(f"model {model} cannot be loaded again; unload it wholly", field="id")
            if not keep and list(self.catalog) == [model]:
                raise Reason.FIELD_INVALID.error(
                    f"model {model} is the only one; load another before it is unloaded", field="id"
                )
            if is_used and not drain:
                raise Reason.MODEL_IN_USE.error(f"jobs need model {model}; set `drain` to unload it after them")
            entry.is_leaving = entry.is_leaving or not keep
            if not is_used:
                self._cancel(entry)
            self._publish(entry)
            return self._add(_Task(entry, self._leave if not keep else self._rest, float("inf")))

    def add_lora(self, model: str, source: LoraSource) -> Future[None]:
        """Loads an adapter into a model, which is loaded first where it is not.

        Returns:
            What ends when it can be asked for; raises ModelError where the adapter is at fault, or HybridSDError.

        Raises:
            HybridSDError: MODEL_UNKNOWN; FIELD_INVALID where the name is taken; MODEL_IN_USE where jobs still use one
                of that name that was unloaded.
            ModelError: If its file is not there.
        """
        check_sources([source])
        with self._changed:
            entry = self._find(model)
            if entry.spec is None or entry.description is None:
                raise Reason.FIELD_INVALID.error(f"model {model} takes no adapters while it is served", field="model")
            if source.key in entry.hidden:
                raise Reason.MODEL_IN_USE.error(f"jobs still use the old adapter {source.name}; come again")
            if any(info.key == source.key for info in entry.description.info.loras):
                raise Reason.FIELD_INVALID.error(
                    f"model {model} has an adapter {source.name} already; unload it first, or choose another `name`",
                    field="name",
                )
            source = replace(source, model=model)
            return self._add(_Task(entry, lambda task: self._extend(task, source), self._clock() + ROOM_S))

    def remove_lora(self, model: str, name: str, owner: str = "") -> None:
        """Lets nobody ask for an adapter any more; its memory is free when no job needs the model.

        Raises:
            HybridSDError: MODEL_UNKNOWN, LORA_UNKNOWN.
        """
        with self._changed:
            entry = self._find(model)
            description, spec = entry.description, entry.spec
            known = () if description is None or spec is None else description.info.loras
            key = next((info.key for info in known if (info.owner, info.name) == (owner, name)), None)
            if description is None or spec is None or key is None:
                whose = f" of {owner[:64]}" if owner else " for everybody"
                raise Reason.LORA_UNKNOWN.error(f"model {model} has no adapter {name[:64]!r}{whose}", field="name")
            left = tuple(info for info in description.info.loras if info.key != key)
            entry.description = replace(description, info=replace(description.info, loras=left))
            entry.spec = replace(spec, loras=tuple(lora for lora in spec.loras if lora.key != key))
            if entry.held:
                entry.hidden.add(key)
                self._add(_Task(entry, self._shrink, float("inf")))
            self._publish(entry)

    def close(self) -> None:
        """Ends what is being loaded; who waits for it hears UNAVAILABLE."""
        with self._changed:
            self._is_closing = True
            tasks, self._tasks = self._tasks, []
            self._changed.notify_all()
        for task in tasks:
            _settle(task.done, Reason.UNAVAILABLE.error("the server is stopping; try another one, or later"))

    def join(self, timeout_s: float) -> None:
        """Waits after `close` for the threads, which may be in the middle of something."""
        for thread in self._threads:
            thread.join(timeout_s / MAX_THREADS)

    # Under the lock.

    def _find(self, model: str) -> _Entry:
        entry = self._entries.get(model)
        if entry is None or entry.is_leaving:
            raise _unknown(model, self.catalog)
        return entry

    def _begin(self, entry: _Entry, device: torch.device) -> Future[None]:
        """Begins to load a model on a device, unless it is or is being loaded."""
        entry.errors.pop(device, None)
        if device in entry.held:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        if device not in entry.loading:
            entry.loading[device] = _Task(entry, self._load, self._clock() + ROOM_S, device)
            self._add(entry.loading[device])
        return entry.loading[device].done

    def _add(self, task: _Task) -> Future[None]:
        if self._is_closing:
            raise Reason.UNAVAILABLE.error("the server is stopping; try another one, or later")
        self._tasks.append(task)
        if len(self._threads) < MAX_THREADS:
            self._threads.append(threading.Thread(target=self._run, name="models", daemon=True))
            self._threads[-1].start()
        self._changed.notify_all()
        return task.done

    def _cancel(self, entry: _Entry) -> None:
        """Gives up all loads of a model; the one that is running notices by itself."""
        entry.loading.clear()

    def _publish(self, entry: _Entry) -> None:
        """Makes it known to all what an entry is."""
        is_there = self._entries.get(entry.id) is entry
        denoisers = {key: value for key, value in self._denoisers.items() if key[0] != entry.id}
        if is_there:
            for held in entry.held.values():
                denoisers |= {(entry.id, worker): denoiser for worker, denoiser in held.denoisers.items()}
        self._denoisers = denoisers
        self.catalog.replace({
            other.id: other.description
            for other in self._entries.values()
            if other.description is not None and not other.is_leaving and not other.is_new
        })  # fmt: skip

    def _view(self, entry: _Entry) -> View:
        def on(device: torch.device) -> OnDevice:
            if device in entry.held:
                return OnDevice(device, State.WARM, max(0.0, self._clock() - entry.held[device].last_use_s))
            if device in entry.loading:
                return OnDevice(device, State.LOADING)
            if device in entry.errors:
                return OnDevice(device, State.FAILED, error=entry.errors[device].message)
            return OnDevice(device, State.COLD)

        description = entry.description
        return View(
            entry.id,
            "" if entry.spec is None else entry.spec.source,
            None if description is None else description.info,
            0 if description is None else description.size_bytes,
            entry.is_leaving,
            tuple(on(device) for device in self._alive_bytes),
        )

    def _kept_bytes(self, device: torch.device) -> int:
        return sum(entry.held[device].size_bytes for entry in self._entries.values() if device in entry.held)

    # What follows runs on the threads, without the lock where it takes a while.

    def _run(self) -> None:
        while True:
            with self._changed:
                while (task := self._next()) is None:
                    if self._is_closing:
                        return
                    self._changed.wait(TICK_S if self._tasks else None)
                self._busy.add(task.entry)
            self._attempt(task)
            with self._changed:
                self._busy.discard(task.entry)
                self._changed.notify_all()
            del task

    def _next(self) -> _Task | None:
        """Returns what can be tried now: on a device one after the other, or the small would overtake the large."""
        waiting: set[torch.device] = set()
        for task in self._tasks:
            if task.entry in self._busy or (task.device is not None and task.device in waiting):
                continue
            if task.retry_s <= self._clock():
                return task
            if task.device is not None:
                waiting.add(task.device)
        return None

    def _attempt(self, task: _Task) -> None:
        entry = task.entry
        error: ModelError | HybridSDError | None = None
        is_ours = False  # whether jobs may hear its words
        try:
            is_done = task.attempt(task)
            if not is_done and self._clock() > task.until_s:
                raise Reason.UNAVAILABLE.error(f"{task.waits_for}; come again", retry_delay_s=RETRY_S)
        except LoadCancelled:
            is_done, error = True, Reason.CANCELLED.error(f"the load of model {entry.id} was given up")
        except (ModelError, HybridSDError) as failed:
            is_done, error, is_ours = True, failed, isinstance(failed, HybridSDError)
        except LoadFailed as failed:
            is_done, error = True, Reason.UNAVAILABLE.error(f"model {entry.id}: {failed}", retry_delay_s=RETRY_S)
        except Exception as failed:
            log.exception("model_failed", model=entry.id)
            text = f"{type(failed).__name__}: {' '.join(str(failed).split())[:200]}"
            is_done, error = True, Reason.UNAVAILABLE.error(f"model {entry.id}: {text}", retry_delay_s=RETRY_S)
        task.reserved.clear()
        if not is_done:
            task.retry_s = self._clock() + (TICK_S if task.device is not None else 3 * TICK_S)
            return
        with self._changed:
            if task in self._tasks:
                self._tasks.remove(task)
            if task.device is not None and entry.loading.get(task.device) is task:
                del entry.loading[task.device]
            if error is not None and task.device is not None:
                self._fail(entry, task.device, error, is_ours=is_ours)
        if error is not None:
            log.warning("model_not_loaded", model=entry.id, message=str(error))
        _settle(task.done, error)
        self._on_change()

    def _fail(self, entry: _Entry, device: torch.device, error: ModelError | HybridSDError, *, is_ours: bool) -> None:
        if entry.is_new:
            if not entry.loading and self._entries.get(entry.id) is entry:
                del self._entries[entry.id]
        elif not (isinstance(error, HybridSDError) and error.reason is Reason.CANCELLED):
            message = str(error).rstrip(".")
            message = message if message.startswith("model") else f"model {entry.id}: {message}"
            failed = f"model {entry.id} could not be loaded; choose another, or have the operator look at `models list`"
            told = Reason.UNAVAILABLE.error(message if is_ours else failed, retry_delay_s=RETRY_S)
            entry.errors[device] = _Failure(message, told, self._clock())

    def _load(self, task: _Task) -> bool:
        entry, device = task.entry, task.device
        assert device is not None
        if device in entry.held:
            return True

        def is_wanted() -> bool:
            return entry.loading.get(device) is task and not self._is_closing

        if not is_wanted():
            raise LoadCancelled
        if entry.spec is None:
            raise ModelError(f"model {entry.id} cannot be loaded again")
        known = entry.description
        if known is not None and not self._has_room(task, device, known.size_bytes):
            return False
        started_s = self._clock()
        skeleton, spec, tensors = entry.skeleton, entry.spec, dict[int, torch.Tensor]()
        if entry.held and skeleton is not None:
            for weights in next(iter(entry.held.values())).weights:
                tensors |= weights.tensors
        else:
            loaded = self._loader.run(
                LoadOrder(spec, self._dtype), is_wanted=is_wanted,
                on_described=lambda described: self._describe(task, device, described),
            )  # fmt: skip
            if loaded is None:
                return False
            skeleton, tensors = loaded.skeleton, dict(loaded.tensors)
            del loaded
        weights = self._weigh(to_device(tensors, device), device)
        task.reserved.clear()
        del tensors
        held, model = self._make(skeleton, (weights,), device, Pace())
        size_bytes = weights.num_bytes
        del weights
        elapsed_s = self._clock() - started_s
        with self._changed:
            if not is_wanted() or self._entries.get(entry.id) is not entry:
                raise LoadCancelled
            before = entry.description
            unknown: dict[str, Any] = {"num_parameters": 0, "loras": (), "text_encoder_digest": b""}  # before a load
            is_same = before is not None and replace(before.info, **unknown) == replace(model.info, **unknown)
            plans = before.plans if before is not None and is_same else model.plans
            entry.description = Description(model.info, plans, size_bytes, model.cost)
            entry.skeleton, entry.held[device], entry.load_s = skeleton, held, elapsed_s
            entry.is_new = False
            self._hide(entry, model)
            self._publish(entry)
        self._metrics.model_load.observe(elapsed_s)
        log.info(
            "model_loaded", model=entry.id, latent_space=model.info.latent_space,
            num_parameters=model.info.num_parameters, device=str(device), dtype=str(self._dtype),
            size_bytes=size_bytes, elapsed_s=round(elapsed_s, 3),
        )  # fmt: skip
        return True

    def _hide(self, entry: _Entry, model: Model) -> None:
        """Lets nobody ask for adapters that were unloaded while the model was being loaded."""
        assert entry.spec is not None
        assert entry.description is not None
        asked = {lora.key for lora in entry.spec.loras}
        infos = entry.description.info.loras
        if gone := {info.key for info in model.info.loras} - asked:
            entry.hidden |= gone
            left = tuple(info for info in infos if info.key in asked)
            entry.description = replace(entry.description, info=replace(entry.description.info, loras=left))
            self._add(_Task(entry, self._shrink, float("inf")))

    def _describe(self, task: _Task, device: torch.device, described: Description) -> bool:
        """Hears what a model is, before its weights are read; says whether to go on."""
        self._check_fits(described)
        with self._changed:
            if task.entry.description is None:
                task.entry.description = described
        return self._has_room(task, device, described.size_bytes)

    def _check_fits(self, described: Description) -> None:
        info = described.info
        if self._max_size is not None and self._max_size < info.size_multiple:
            raise ModelError(
                f"model {info.id} takes multiples of {info.size_multiple} pixels, but --max-size is {self._max_size}"
            )
        if self._budget_bytes is not None and described.size_bytes > self._budget_bytes:
            raise ModelError(
                f"model {info.id} takes {described.size_bytes / GIB:.3g} GiB, but --memory-budget is"
                f" {self._budget_bytes / GIB:.3g} GiB; it fits on no device"
            )

    def _has_room(self, task: _Task, device: torch.device, size_bytes: int) -> bool:
        """Makes room on a device, of models that no job needs, the least recently used first; False: not yet."""
        if self._budget_bytes is None:
            return True
        with self._closed(device) as used, self._changed:
            reserved = sum(other.reserved.get(device, 0) for other in self._tasks if other is not task)
            over = self._kept_bytes(device) + reserved + size_bytes - self._budget_bytes
            holders = [e for e in self._entries.values() if device in e.held and e is not task.entry]
            idle = [e for e in holders if e.id not in used and e.spec is not None and e not in self._busy]
            leaving: list[_Entry] = []
            for entry in sorted(idle, key=lambda other: other.held[device].last_use_s):
                if over <= 0:
                    break
                leaving.append(entry)
                over -= entry.held[device].size_bytes
            if over > 0:
                names = ", ".join(entry.id for entry in holders if entry not in idle) or "others"
                task.waits_for = (
                    f"model {task.entry.id} takes {size_bytes / GIB:.3g} GiB, and jobs need {names} on {device}, of"
                    f" whose {self._budget_bytes / GIB:.3g} GiB for models too little is left"
                )
                return False
            for entry in leaving:
                self._evict(entry, device)
                self._metrics.evictions.inc()
            has_room = self._alive_bytes[device] + reserved + size_bytes <= self._budget_bytes
            if has_room:
                task.reserved[device] = size_bytes
            task.waits_for = f"the memory of models that were evicted from {device} is not free yet"
        if leaving:
            self._on_change()
        return has_room

    @contextmanager
    def _closed(self, device: torch.device) -> Iterator[set[str]]:
        """Lets no job move to a device because of what is loaded there, and yields what those there need."""
        with self._changed:
            entries = [entry for entry in self._entries.values() if device in entry.held]
            for entry in entries:
                entry.closed.add(device)
        try:
            yield self._used(device)
        finally:
            with self._changed:
                for entry in entries:
                    entry.closed.discard(device)

    def _evict(self, entry: _Entry, device: torch.device) -> None:
        held = entry.held.pop(device)
        if not entry.held:
            entry.skeleton = None
            entry.hidden.clear()
        self._publish(entry)
        log.info("model_evicted", model=entry.id, device=str(device), size_bytes=held.size_bytes)

    def _used(self, device: torch.device) -> set[str]:
        workers = [index for index, other in enumerate(self._devices) if other == device]
        return set().union(*(self._in_use(worker) for worker in workers))

    def _is_used(self, entry: _Entry, devices: Mapping[torch.device, object]) -> bool:
        return any(entry.id in self._used(device) for device in devices)

    def _is_needed(self, entry: _Entry) -> bool:
        return entry.id in self._needed() or self._is_used(entry, self._alive_bytes)

    def _leave(self, task: _Task) -> bool:
        """Lets go of a model for good, when no job needs it."""
        if self._is_needed(task.entry):
            return False
        with self._changed:
            self._cancel(task.entry)
            self._entries.pop(task.entry.id, None)
            task.entry.held.clear()
            self._publish(task.entry)
        log.info("model_unloaded", model=task.entry.id)
        return True

    def _rest(self, task: _Task) -> bool:
        """Lets go of a model that stays known, when no job needs it."""
        entry = task.entry
        if self._is_needed(entry):
            return False
        for device in list(entry.held):
            with self._closed(device) as used, self._changed:
                if entry.id in used:
                    return False
                self._evict(entry, device)
        return True

    def _extend(self, task: _Task, source: LoraSource) -> bool:
        """Reads an adapter into a model on all devices where it is loaded."""
        entry = task.entry
        with self._changed:
            if entry.is_leaving or self._entries.get(entry.id) is not entry:
                raise LoadCancelled
            if not entry.held or entry.skeleton is None:
                failures = list(entry.errors.values())
                if failures and not entry.loading:
                    raise Reason.UNAVAILABLE.error(failures[0].message, retry_delay_s=RETRY_S)
                if not entry.loading:
                    self._begin(entry, self._devices[0])
                task.waits_for = f"model {entry.id} has not been loaded for its adapter {source.name}"
                return False
            if entry.description and any(info.key == source.key for info in entry.description.info.loras):
                raise Reason.FIELD_INVALID.error(f"model {entry.id} has an adapter {source.name} now", field="name")
        info = describe_lora(source)
        size_bytes = info.num_parameters * self._dtype.itemsize
        if not all(self._has_room(task, device, size_bytes) for device in list(entry.held)):
            return False
        is_done = self._change(entry, (source,), ())
        if is_done:
            log.info("lora_loaded", model=entry.id, lora=source.name, owner=source.owner or None)
        return is_done

    def _shrink(self, task: _Task) -> bool:
        """Takes hidden adapters out of a model, when no job needs it."""
        entry = task.entry
        if not entry.hidden or not entry.held:
            return True
        if self._is_used(entry, entry.held):
            task.retry_s = self._clock() + 10 * TICK_S
            return False
        return self._change(entry, (), tuple(entry.hidden))

    def _change(self, entry: _Entry, add: tuple[LoraSource, ...], remove: tuple[str, ...]) -> bool:
        """Replaces a model by one with other adapters, which shares the rest; False where it is not loaded any more."""
        skeleton = entry.skeleton
        if skeleton is None:
            return False

        def is_wanted() -> bool:
            return not self._is_closing and not entry.is_leaving

        loaded = self._loader.run(AdapterOrder(skeleton, add, remove), is_wanted=is_wanted)
        assert loaded is not None
        made: dict[torch.device, _Held] = {}
        model: Model | None = None
        for device, held in list(entry.held.items()):
            weights = held.weights
            if loaded.tensors:
                weights = (*weights, self._weigh(to_device(loaded.tensors, device), device))
            made[device], model = self._make(loaded.skeleton, weights, device, Pace())
            made[device].last_use_s = held.last_use_s
        if model is None:
            return False
        with self._changed:
            assert entry.description is not None
            assert entry.spec is not None
            entry.skeleton, entry.held = loaded.skeleton, made
            entry.hidden -= set(remove)
            visible = tuple(info for info in model.info.loras if info.key not in entry.hidden)
            size_bytes = next(iter(made.values())).size_bytes
            info = replace(entry.description.info, loras=visible)
            entry.description = replace(entry.description, info=info, size_bytes=size_bytes)
            entry.spec = replace(entry.spec, loras=(*entry.spec.loras, *add))
            self._publish(entry)
        return True

    def _weigh(self, tensors: Mapping[int, torch.Tensor], device: torch.device) -> Weights:
        """Takes tensors as used memory of a device, until they are free."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())

        def on_freed() -> None:
            with self._changed:
                self._alive_bytes[device] -= num_bytes
                self._changed.notify_all()

        with self._changed:
            self._alive_bytes[device] += num_bytes
        return Weights(tensors, device, self._bin, on_freed=on_freed)

    def _make(
        self, skeleton: Skeleton[Model], weights: tuple[Weights, ...], device: torch.device, pause: Callable[[], None]
    ) -> tuple[_Held, Model]:
        """Makes a model for each worker of a device; weights that it has no use for are let go of."""
        tensors = {number: tensor for part in weights for number, tensor in part.tensors.items()}
        denoisers: dict[int, Denoiser] = {}
        model: Model | None = None
        for worker, other in enumerate(self._devices):
            if other == device:
                numbers: dict[int, int] = {}
                model = unpack(skeleton, tensors, device, pause=pause, numbers=numbers)
                weights = tuple(part for part in weights if not part.tensors.keys().isdisjoint(numbers.values()))
                denoisers[worker] = model.denoiser
                for part in weights:
                    part.keep_for(model.denoiser)
        assert model is not None
        return _Held(weights, denoisers, self._clock()), model


def _settle(future: Future[None], error: Exception | None) -> None:
    """Ends a future, unless it has ended."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _unknown(model: str, catalog: Catalog) -> HybridSDError:
    return Reason.MODEL_UNKNOWN.error(
        f"model {model[:64]!r} is not served; choose one of {', '.join(catalog)}", field="model"
    )
