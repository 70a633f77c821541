"""What the answer cache makes of a request: what may be done for it, and the key under which its answer is kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.config import CacheSettings
from chorus.coordinator.placing import Placing
from chorus.core.cache.policy import CacheMode, Permission, Plan, normalised, plan
from chorus.core.errors import ChorusError, InvalidRequestError
from chorus.core.generation import GenerationRequest
from chorus.core.placement import Needs
from chorus.transport.peer import current_caller
from chorus.wire.cache import decode_mode, digest_of
from chorus.wire.fallback import decode_fallback
from chorus.wire.generation import decode_generation
from chorus.wire.resources import decode_duration

_REMEMBERED = 1024
_LONGEST_REMEMBERED = 8 << 10  # bytes of a spec


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the cache sees it. `key` is one for the very same requests of one caller.

    `told`: the caller asked for a cache, and is told what became of it; `together`: in one message with the answer.
    """

    plan: Plan
    told: bool
    together: bool
    caller: str
    key: str
    permission: Permission
    normalised: GenerationRequest
    max_age_s: float

    @property
    def flight(self) -> tuple[str, Permission]:
        """One for the very same requests that the very same may answer."""
        return self.key, self.permission

    def since(self, now: float) -> float:
        """Answers made before that are too old."""
        return now - self.max_age_s


@dataclass(frozen=True, slots=True)
class _Read:
    """A spec of one caller, read. `keys` are those by the model that it means, with the request for that one."""

    plan: Plan
    needs: Needs
    asked: GenerationRequest
    normalised: GenerationRequest
    keys: dict[str, tuple[str, GenerationRequest]] = field(default_factory=dict)


class AskedReader:
    """Reads requests, those that come again from memory: reading one takes longer than all else of a hit."""

    def __init__(self, settings: CacheSettings, placing: Placing) -> None:
        self._ttl_s = settings.ttl_s
        self._default = CacheMode(settings.mode)
        self._on_network = settings.is_shared
        self._placing = placing
        self._default_model = ""
        self._read: OrderedDict[tuple[str, CacheMode | None, bytes], _Read] = OrderedDict()

    def read(self, request: coordinator_pb2.GenerateRequest) -> Asked | None:
        """What the cache may do; None where it has nothing to do with the request, or that is wrong in other ways.

        Raises InvalidRequestError for a cache that is asked for and can't be had.
        """
        mode = decode_mode(request.cache)
        if request.HasField("ensemble"):
            if mode not in (None, CacheMode.OFF):
                raise InvalidRequestError(
                    "cache.mode", "answers of several models are not kept; ask for it, or for one"
                )
            return None
        if (mode or self._default) is CacheMode.OFF and not request.fallback.cached_answer:
            return None
        caller = str(current_caller() or "")
        try:
            read = self._remembered(request, caller, mode)
        except ChorusError:
            return None  # told by whoever makes answers, who keeps count of such requests
        model = self._model_of(read)
        if model not in read.keys:
            plain = replace(read.normalised, model=model)
            read.keys[model] = digest_of(caller, request=plain), plain
        key, plain = read.keys[model]
        age_s = decode_duration(request.cache.max_age) if request.cache.HasField("max_age") else self._ttl_s
        told = mode is not None and mode is not CacheMode.OFF
        permission = Permission.of(read.asked, decode_fallback(request.fallback))
        return Asked(read.plan, told, request.cache.reads_more, caller, key, permission, plain, min(age_s, self._ttl_s))

    def _remembered(self, request: coordinator_pb2.GenerateRequest, caller: str, mode: CacheMode | None) -> _Read:
        spec = request.spec.SerializeToString()
        place = caller, mode, spec
        read = self._read.get(place)
        if read is None:
            generation = decode_generation(request.spec)
            plain = normalised(generation)
            planned = plan(generation, mode, self._default, on_network=self._on_network)
            read = _Read(planned, Needs.of_generation(plain), generation, plain)
            if len(spec) <= _LONGEST_REMEMBERED:
                self._read[place] = read
                if len(self._read) > _REMEMBERED:
                    self._read.popitem(last=False)
        else:
            self._read.move_to_end(place)
        return read

    def _model_of(self, read: _Read) -> str:
        """The model that the request means; of one that names none, where nobody is left, its last one."""
        model = self._placing.resolved(read.needs).model
        if not read.normalised.model and model:
            self._default_model = model
        return model or self._default_model
