"""States that jobs have come to, kept for whoever asks for the same again: a store of bounded size.

A state is found by all that decides its bits, `Key`, and the call that it is before: it answers a job that ends there,
and one that ends later begins there. Knows nothing of threads, devices or messages; the engine holds its lock.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

from cloud_server.engine.near import Feature
from cloud_server.engine.request import JobRequest, Latents
from cloud_server.engine.step import Texts
from cloud_server.models.denoiser import Encoded

MAX_NEAR = 256
"""Texts that one text is compared with."""


@dataclass(frozen=True, slots=True)
class Key:
    """What decides the bits of a state, but for its call. One server has one kind of device, and one dtype for it."""

    owner: str
    """Who may be answered: nobody else ever is."""
    seed: int
    image_index: int
    models: tuple[tuple[str, Hashable], ...]
    """Of the job, in order, with what `ServedModels.content` said of each."""
    digest: bytes
    """See `prefix_digest`."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A state that is kept, with what the answer needs beside it. Nobody writes to its arrays."""

    call: int
    """The next call to run."""
    arrays: tuple[Latents, ...]
    x0_preview: Latents | None
    """None where no job asked for it."""
    texts: tuple[Texts, ...]
    """Of each stage; states of one prompt share them."""

    @property
    def num_bytes(self) -> int:
        """Of its own arrays."""
        return sum(array.nbytes for array in self.arrays) + (0 if self.x0_preview is None else self.x0_preview.nbytes)


class PrefixCache:
    """The store. What was not asked for longest goes first, and before it what no job ended with."""

    def __init__(self, max_bytes: int) -> None:
        """Takes how many bytes all states and their texts may have; 0 keeps none."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Of what is kept now."""
        self._ends: OrderedDict[tuple[Key, int], Held] = OrderedDict()
        self._others: OrderedDict[tuple[Key, int], Held] = OrderedDict()
        self._calls: dict[Key, set[int]] = {}
        self._texts: dict[Key, tuple[Texts, ...]] = {}
        self._num_uses: Counter[int] = Counter()  # of encoded texts, by id
        self._hints: Counter[tuple[str, int, int]] = Counter()
        self._near: dict[Key, OrderedDict[Key, Feature]] = {}  # by what must agree, then by `Key`
        self._groups: dict[Key, Key] = {}  # the same, the other way

    def __len__(self) -> int:
        """Returns how many states are kept."""
        return len(self._ends) + len(self._others)

    def may_hold(self, owner: str, seed: int, image_index: int) -> bool:
        """Whether something is kept that may answer a request: enough to look at it closely."""
        return (owner, seed, image_index) in self._hints

    def find(self, key: Key, after_call: int, last_call: int, *, exactly: bool = False) -> Held | None:
        """Returns the kept state that is furthest, or None.

        Args:
            key: Of the job.
            after_call: The state is before a later call than this.
            last_call: And before this one at most.
            exactly: Only that one will do.
        """
        calls = self._calls.get(key, set())
        call = max((call for call in calls if after_call < call <= last_call), default=None)
        if call is None or (exactly and call != last_call):
            return None
        store = self._ends if (key, call) in self._ends else self._others
        store.move_to_end((key, call))
        return store[key, call]

    def find_near(
        self, group: Key, feature: Feature, after_call: int, last_call: int, min_similarity: float
    ) -> tuple[Held, float] | None:
        """Returns a state of the job of the nearest text, and how near that is, or None.

        Args:
            group: Of the job: what must agree.
            feature: Of its text.
            after_call: See `find`.
            last_call: See `find`.
            min_similarity: The text is as near as this at least.
        """
        held: Mapping[Key, Feature] = self._near.get(group, {})
        similar = sorted(((float(other @ feature), key) for key, other in held.items()), key=lambda pair: -pair[0])
        for similarity, key in similar:
            if similarity < min_similarity:
                return None
            found = self.find(key, after_call, last_call)
            if found is not None:
                return found, min(similarity, 1.0)
        return None

    def keep(self, key: Key, held: Held, *, is_end: bool, near: tuple[Key, Feature] | None = None) -> None:
        """Keeps a state, and drops others where there is no room for it.

        Args:
            key: Of its job.
            held: The state.
            is_end: Whether its job ended there, and it is worth more.
            near: Where jobs of other texts may begin with it: what must agree, and what its text is compared by.
        """
        place = (key, held.call)
        before = self._ends.get(place) or self._others.get(place)
        if before is not None:
            is_end = is_end or place in self._ends
            if before.x0_preview is not None and held.x0_preview is None:
                held = before
            self._drop(place)
        held = replace(held, texts=self._texts.get(key, held.texts))
        texts_bytes = sum(_text_bytes(text) for text in _texts(held.texts))
        if held.num_bytes + texts_bytes > self.max_bytes:
            return
        if key not in self._calls:
            self._calls[key], self._texts[key] = set(), held.texts
            self._hints[key.owner, key.seed, key.image_index] += 1
            for text in _texts(held.texts):
                self._num_uses[id(text)] += 1
                self.num_bytes += _text_bytes(text) if self._num_uses[id(text)] == 1 else 0
        self._calls[key].add(held.call)
        if near is not None and key not in self._groups:
            group, feature = near
            self._groups[key] = group
            self._near.setdefault(group, OrderedDict())[key] = feature
            self.num_bytes += feature.nbytes
            if len(self._near[group]) > MAX_NEAR:
                self._forget_near(next(iter(self._near[group])))
        (self._ends if is_end else self._others)[place] = held
        self.num_bytes += held.num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._others or self._ends)))

    def _drop(self, place: tuple[Key, int]) -> None:
        held = self._ends.pop(place, None) or self._others.pop(place)
        key, call = place
        self.num_bytes -= held.num_bytes
        self._calls[key].discard(call)
        if self._calls[key]:
            return
        del self._calls[key]
        self._forget_near(key)
        for text in _texts(self._texts.pop(key)):
            self._num_uses[id(text)] -= 1
            if not self._num_uses[id(text)]:
                del self._num_uses[id(text)]
                self.num_bytes -= _text_bytes(text)
        hint = (key.owner, key.seed, key.image_index)
        self._hints[hint] -= 1
        if not self._hints[hint]:
            del self._hints[hint]

    def _forget_near(self, key: Key) -> None:
        """Lets a job's states be found by its own text only."""
        group = self._groups.pop(key, None)
        if group is not None:
            self.num_bytes -= self._near[group].pop(key).nbytes
            if not self._near[group]:
                del self._near[group]


def prefix_digest(request: JobRequest, plan_digest: bytes, *, has_prompt: bool = True) -> bytes:
    """Returns the digest of all in a request that decides the bits of its states, but for models' contents and owners.

    How far it runs is in it only where that decides which calls are skipped; what it shows and how it is sent never.

    Args:
        request: The job.
        plan_digest: Of its plan.
        has_prompt: Whether the prompt is in it: without it, it is what near texts must agree in.
    """
    sha = hashlib.sha256(b"hybridsd.prefix.v1")

    def add(*parts: object) -> None:
        for part in parts:
            content = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
            sha.update(len(content).to_bytes(8, "little"))
            sha.update(content)

    def add_arrays(*arrays: Latents | None) -> None:
        for array in arrays:
            add(None) if array is None else add(array.shape, array.tobytes())

    for text in (request.prompt if has_prompt else None, request.negative_prompt):
        if isinstance(text, Encoded):
            add("embeddings")
            add_arrays(text.embeds, text.pooled)
        else:
            add("text", text)
    add(request.text_options, request.stages, request.loras, request.skipping, request.seed, request.image_index)
    add(request.latent_shape, request.size, plan_digest, request.first_call, len(request.initial_state))
    add_arrays(*request.initial_state, request.initial_latents, request.known_latents, request.mask)
    if request.skipping is not None and request.skipping.num_last_calls:
        add(request.handoff_call)  # the calls before it are not skipped
    return sha.digest()


def _texts(texts: tuple[Texts, ...]) -> Iterator[Encoded]:
    """Yields each encoded text once."""
    seen = {id(text): text for stage in texts for text in stage if text is not None}
    yield from seen.values()


def _text_bytes(text: Encoded) -> int:
    return text.embeds.nbytes + (0 if text.pooled is None else text.pooled.nbytes)
