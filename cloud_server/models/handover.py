"""A loaded model in two parts: its modules without tensors, as bytes, and its tensors, in memory that processes share.

One process loads, another maps. What is unpacked from one skeleton shares its tensors with all else that is unpacked
from it: a model with one adapter more takes the memory of that adapter. Knows nothing of which models there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import pickle
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Tensors = Mapping[int, torch.Tensor]
"""By their numbers in a skeleton."""

PACE_SHARE = 0.2
"""Of a second that an unpacking thread takes of the interpreter, beside threads that step."""
PACE_SLICE_S = 0.001
MAX_TOKENIZERS = 8
"""Tokenizers that are kept, to be shared: reading one holds up all threads for 0.1 s, and most models have the same."""
COPY_BYTES = 16 * 2**20
"""To a GPU at a time: what a step copies does not wait for longer than that takes."""

FREE_BYTES, FREE_PAUSE_S = 2**20, 0.001
"""Between tensors of such a size that are freed, others have a turn."""

_ALIGNMENT = 64
_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True, slots=True)
class Skeleton(Generic[T]):
    """A thing without its tensors and tokenizers."""

    content: bytes
    tokenizers: Mapping[bytes, bytes]
    """Pickled, by digest."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def pack(thing: T, numbers: Mapping[int, int] | None = None) -> tuple[Skeleton[T], dict[int, torch.Tensor]]:
    """Takes a thing apart.

    Args:
        thing: What can be pickled but for its tensors.
        numbers: Of tensors that are known already, by `id`: as `unpack` tells them.

    Returns:
        The skeleton, and its tensors that were not known. They are the thing's own.
    """
    stream = io.BytesIO()
    packer = _Packer(stream, numbers or {})
    packer.dump(thing)
    return Skeleton(stream.getvalue(), packer.tokenizers), packer.new


def unpack(
    skeleton: Skeleton[T],
    tensors: Tensors | None,
    device: torch.device,
    *,
    pause: Callable[[], None] = lambda: None,
    numbers: dict[int, int] | None = None,
) -> T:
    """Puts a thing together.

    Args:
        skeleton: Of `pack`, of this process or of one that is trusted as itself.
        tensors: On `device`; the thing goes on to use them. None: others of the right shapes and types, all together
            without memory, and nothing to compute with.
        device: What the thing takes for its own.
        pause: Called between the pieces, for `Pace`.
        numbers: Filled with the numbers of tensors, by `id`, if given.
    """
    unpacker = _Unpacker(io.BytesIO(skeleton.content), skeleton.tokenizers, tensors, device, pause)
    thing: T = unpacker.load()
    if numbers is not None:
        numbers |= {id(tensor): number for number, tensor in unpacker.made.items()}
    return thing


class Pace:
    """Lets a thread beside others take its part of the interpreter, and no more."""

    def __init__(self, share: float = PACE_SHARE) -> None:
        """Takes the part, in (0, 1]; 1 never pauses."""
        self._rest = 1.0 / share - 1.0
        self._since_s = time.thread_time()

    def __call__(self) -> None:
        """Sleeps, if it is time to. To be called by one thread, often."""
        spent_s = time.thread_time() - self._since_s
        if spent_s >= PACE_SLICE_S and self._rest:
            time.sleep(spent_s * self._rest)
            self._since_s = time.thread_time()


def write_shared(file: int, tensors: Tensors) -> dict[int, Place]:
    """Writes tensors into an empty file in memory, one after the other; each one's own memory is let go of at once.

    Raises:
        OSError: If there is no memory.
    """
    places, end = {}, 0
    for number, tensor in tensors.items():
        places[number] = Place(end, tuple(tensor.shape), tensor.dtype)
        end += -(-places[number].num_bytes // _ALIGNMENT) * _ALIGNMENT
    os.ftruncate(file, end)
    for number, tensor in tensors.items():
        plain = tensor.detach().contiguous().reshape(-1)
        if plain.numel():
            array: Any = plain.view(torch.uint8).numpy()
            content, offset = memoryview(array), places[number].offset
            while content:
                written = os.pwrite(file, content, offset)
                content, offset = content[written:], offset + written
            del content, array
        del plain
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    return places


def read_shared(file: int, places: Mapping[int, Place], bin_: Bin) -> dict[int, torch.Tensor]:
    """Returns the tensors of a file in memory, without copying: they use its pages until the last of them is gone.

    Args:
        file: Of `write_shared`.
        places: Likewise.
        bin_: Where the pages go then.
    """
    size_bytes = os.fstat(file).st_size
    if not size_bytes:
        return {number: torch.empty(place.shape, dtype=place.dtype) for number, place in places.items()}
    address = _libc.mmap(None, size_bytes, _PROT_READ | _PROT_WRITE, _MAP_SHARED, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"cannot map {size_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    kind: Any = type("Pages", (ctypes.c_ubyte * size_bytes,), {})  # of its own, for a weak reference
    pages = kind.from_address(address)
    finalizer = weakref.finalize(pages, bin_.put, _Unmap(address, size_bytes))
    finalizer.atexit = False
    return {
        number: torch.frombuffer(
            pages, dtype=place.dtype, count=int(torch.Size(place.shape).numel()), offset=place.offset
        ).reshape(place.shape)
        if place.num_bytes
        else torch.empty(place.shape, dtype=place.dtype)
        for number, place in places.items()
    }  # fmt: skip


def to_device(tensors: Tensors, device: torch.device) -> dict[int, torch.Tensor]:
    """Returns tensors on a device: the same ones where they are there, else copies, made beside what it computes.

    Raises:
        torch.OutOfMemoryError: If they do not fit.
    """
    if device.type != "cuda":
        return {number: tensor.to(device) for number, tensor in tensors.items()}
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copies = {}
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for number, tensor in tensors.items():
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            step = max(1, COPY_BYTES // max(1, tensor.dtype.itemsize))
            target, source = copy.view(-1), tensor.detach().reshape(-1)
            for start in range(0, source.numel(), step):
                target[start : start + step].copy_(source[start : start + step])
            copies[number] = copy
    stream.synchronize()
    return copies


class Bin:
    """Frees what is not needed any more: gigabytes take a while, in which the interpreter must not be held."""

    def __init__(self) -> None:
        """Has no thread until something comes."""
        self._things: deque[_Unmap | _Freeing | Callable[[], None]] = deque()
        self._changed = threading.Condition(threading.RLock())  # finalizers may come to a thread that is in here
        self._thread: threading.Thread | None = None

    def put(self, thing: _Unmap | _Freeing | Callable[[], None]) -> None:
        """Takes what is to be done, in turn. Never waits."""
        with self._changed:
            self._things.append(thing)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bin", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._things:
                    self._changed.wait()
                thing = self._things.popleft()
            if isinstance(thing, _Unmap):
                _libc.munmap(thing.address, thing.size_bytes)  # without the interpreter's lock
            elif isinstance(thing, _Freeing):
                if thing.device.type == "cuda":
                    torch.cuda.synchronize(thing.device)  # calls that were begun go on to read it
                while thing.tensors:
                    num_bytes = thing.tensors.popitem()[1].nbytes  # one after the other, for the same reason
                    if num_bytes >= FREE_BYTES:
                        time.sleep(FREE_PAUSE_S)
                self.put(thing.on_freed)  # after the pages that they were in
            else:
                thing()
            del thing


class Weights:
    """Tensors on one device, which are freed by a `Bin` when nobody has these weights any more."""

    def __init__(self, tensors: Tensors, device: torch.device, bin_: Bin, *, on_freed: Callable[[], None]) -> None:
        """Takes the tensors, where they are, what frees them, and who hears of it then."""
        self.tensors, self.device = dict(tensors), device
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        finalizer = weakref.finalize(self, bin_.put, _Freeing(self.tensors, device, on_freed))
        finalizer.atexit = False

    def keep_for(self, thing: object) -> None:
        """Stays as long as a thing does, which uses the tensors."""
        finalizer = weakref.finalize(thing, _let_go, self)
        finalizer.atexit = False


def _let_go(_weights: Weights) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Unmap:
    address: int
    size_bytes: int


@dataclass(eq=False, slots=True)
class _Freeing:
    tensors: dict[int, torch.Tensor]
    device: torch.device
    on_freed: Callable[[], None]


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, numbers: Mapping[int, int]) -> None:
        super().__init__(stream, protocol=5)
        self._numbers = dict(numbers)
        self._next = 1 + max(self._numbers.values(), default=-1)
        self._digests: dict[int, bytes] = {}
        self.new: dict[int, torch.Tensor] = {}
        self.tokenizers: dict[bytes, bytes] = {}

    def persistent_id(self, thing: Any) -> Any:
        """See pickle."""
        if isinstance(thing, torch.Tensor):
            if id(thing) not in self._numbers:
                self._numbers[id(thing)] = self._next
                self.new[self._next] = thing
                self._next += 1
            is_parameter = isinstance(thing, torch.nn.Parameter)
            return ("tensor", self._numbers[id(thing)], is_parameter, tuple(thing.shape), thing.dtype)
        if isinstance(thing, torch.device):
            return ("device",)
        if isinstance(thing, PreTrainedTokenizerBase):
            if id(thing) not in self._digests:
                digest = self._digests[id(thing)] = _digest(thing)
                self.tokenizers[digest] = pickle.dumps(thing)
                _tokenizers.keep(digest, thing)
            return ("tokenizer", self._digests[id(thing)])
        return None


class _Unpacker(pickle.Unpickler):
    def __init__(
        self,
        stream: io.BytesIO,
        tokenizers: Mapping[bytes, bytes],
        tensors: Tensors | None,
        device: torch.device,
        pause: Callable[[], None],
    ) -> None:
        super().__init__(stream)
        self._tokenizer_bytes, self._tensors, self._device, self._pause = tokenizers, tensors, device, pause
        self.made: dict[int, torch.Tensor] = {}

    def persistent_load(self, what: Any) -> Any:
        """See pickle."""
        self._pause()
        if what[0] == "device":
            return self._device
        if what[0] == "tokenizer":
            return _tokenizers.find(what[1], self._tokenizer_bytes)
        _, number, is_parameter, shape, dtype = what
        if number not in self.made:
            if self._tensors is None:
                tensor = torch.zeros((), dtype=dtype).expand(shape)
            else:
                tensor = self._tensors[number].detach()
            self.made[number] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self.made[number]


class _Tokenizers:
    """Tokenizers by digest."""

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, digest: bytes, tokenizer: Any) -> None:
        with self._lock:
            self._held[digest] = tokenizer
            self._held.move_to_end(digest)
            while len(self._held) > MAX_TOKENIZERS:
                self._held.popitem(last=False)

    def find(self, digest: bytes, pickled: Mapping[bytes, bytes]) -> Any:
        with self._lock:
            held = self._held.get(digest)
        if held is None:
            held = pickle.loads(pickled[digest])
            self.keep(digest, held)
        return held


_tokenizers = _Tokenizers()


def _digest(tokenizer: Any) -> bytes:
    """Returns the same for tokenizers that do the same, from whichever folder they came."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = pickle.dumps(tokenizer) if backend is None else backend.to_str().encode()
    ids = f"{type(tokenizer).__name__} {tokenizer.bos_token_id} {tokenizer.eos_token_id} {tokenizer.pad_token_id}"
    return hashlib.sha256(said + ids.encode()).digest()
