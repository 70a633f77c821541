"""Answers to other questions that mean the same: the mesh's own embedding model finds a few, and the gate decides.

Compared are questions of one caller alone, for the same model, settings and turns before; the rest of the request has
to be equal. Cosine only says which few are looked at. A question is embedded only where the request itself may go.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.coordinator.placing import Placing
from chorus.coordinator.requests import Sink
from chorus.core.cache.budget import Budget
from chorus.core.cache.gate import Gate
from chorus.core.cache.likeness import alike
from chorus.core.cache.nearest import Vector
from chorus.core.cache.policy import Permission, question_of, without_question
from chorus.core.errors import ChorusError
from chorus.core.generation import EmbeddingRequest, GenerationRequest, Requirements
from chorus.core.placement import Needs
from chorus.store.answer_store import STORE_ERRORS, Answers
from chorus.store.answers import Kept
from chorus.store.gate import read_gate
from chorus.wire.cache import Recorded, digest_of, text_of
from chorus.wire.embedding import encode_embedding

# The gate reads a question in about a millisecond; a paraphrase is among the nearest few, or too far away for it.
_LOOKED_AT = 6
_LEAST_COSINE = 0.7
# A vector that takes longer costs more than it saves.
_EMBED_S = 2.0
_NO_MODEL = "no embedding model is in the mesh, so only the very same request has a cached answer"


@dataclass(frozen=True, slots=True)
class Hint:
    """What was found for a question. `kept` is an answer that would do; `explores`: make a new one and compare.

    `vector`, of length one, and `bucket` are to be kept with a new answer; `problem` says why there are none.
    """

    question: str = ""
    bucket: str = ""
    vector: Vector | None = None
    kept: Kept | None = None
    confidence: float = 0.0
    explores: bool = False
    problem: str = ""


class _Soon:
    """A call's context for one question of the coordinator's own, which may not take all the time that is left."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def time_remaining(self) -> float:
        left_s = self._sink.time_remaining()
        return _EMBED_S if left_s is None else min(left_s, _EMBED_S)


class Embed(Protocol):
    """The coordinator's own Embed."""

    async def __call__(self, request: coordinator_pb2.EmbedRequest, context: _Soon, *, allow_external: bool) -> bytes:
        """The bytes of an EmbedResponse."""


class SemanticHits:
    """Finds them. `model` None: whichever of the mesh embeds; `embed` is the coordinator's own Embed."""

    def __init__(
        self,
        embed: Embed,
        *,
        placing: Placing,
        store: Answers,
        model: str | None,
        budget: Budget,
        rng: random.Random | None = None,
    ) -> None:
        self._embed = embed
        self._placing = placing
        self._store = store
        self._model = model or ""
        self._budget = budget
        self._rng = rng if rng is not None else random.Random()
        self._gate: Gate | None = None

    def problem(self) -> str:
        """Why there can be no semantic hits now; empty where there can."""
        return "" if self._placing.resolved(Needs.of_embedding(self._asks(""))).model else _NO_MODEL

    def _problem_of(self, asks: EmbeddingRequest, permission: Permission) -> str:
        """Why no embedding model may have this question now; empty where one may."""
        needs = replace(Needs.of_embedding(asks), allow_external=permission.external)
        needs = self._placing.resolved(needs)
        if not needs.model:
            return _NO_MODEL
        if self._placing.has_place(needs):
            return ""
        refused = self._placing.explain(needs).error
        return f"the question may not be embedded: {refused.message if refused is not None else 'nobody fits'}"

    async def look(
        self,
        request: GenerationRequest,
        caller: str,
        sha256s: Sequence[str],
        permission: Permission,
        *,
        since: float,
        sink: Sink,
    ) -> Hint:
        """What there is for a request whose question may be compared."""
        question = question_of(request)
        assert question is not None, "the plan says exact for such requests"
        asks = self._asks(question, replace(request.requirements, private=permission.private))
        problem = self._problem_of(asks, permission)
        if problem:
            return Hint(problem=problem)
        if self._gate is None:  # its lexicon takes a while to read, and no stream may wait for that
            self._gate = await asyncio.to_thread(read_gate)
        try:
            raw = await self._embed(
                coordinator_pb2.EmbedRequest(spec=encode_embedding(asks)),
                _Soon(sink),
                allow_external=permission.external,
            )
        except ChorusError as error:
            return Hint(problem=f"the question could not be embedded: {error.message}")
        result = coordinator_pb2.EmbedResponse.FromString(raw).result
        vector = np.asarray(result.embeddings[0].values, np.float32)
        vector /= max(float(np.linalg.norm(vector)), 1e-12)
        bucket = digest_of(caller, result.artifact_sha256 or result.model, request=without_question(request))
        try:
            near = await self._store.near(bucket, sha256s, vector, since=since, limit=_LOOKED_AT)
        except STORE_ERRORS as error:
            return Hint(question, bucket, vector, problem=f"earlier questions could not be looked at: {error}")
        kept, confidence = _best(self._gate, question, near)
        explores = kept is not None and self._budget.explores(kept.right, kept.wrong, self._rng.random())
        return Hint(question, bucket, vector, kept, confidence, explores)

    def alike(self, kept: Kept, recorded: Recorded) -> bool:
        """Whether a would-be hit says the same as the answer that was made instead."""
        return alike(text_of(kept.answer), recorded.text)

    def _asks(self, question: str, asked: Requirements | None = None) -> EmbeddingRequest:
        """The question for whoever the request itself may go to; what it asks of its model is of no matter here."""
        asked = asked if asked is not None else Requirements()
        limits = Requirements(
            labels=asked.labels, runner_ids=asked.runner_ids, node_ids=asked.node_ids, private=asked.private
        )
        return EmbeddingRequest(model=self._model, inputs=(question,), requirements=limits)


def _best(gate: Gate, question: str, near: Sequence[Kept]) -> tuple[Kept | None, float]:
    """The one that the gate is surest of, and how sure; None where it is of none."""
    best, confidence = None, 0.0
    for kept in near:
        if kept.cosine < _LEAST_COSINE:
            break
        sure = gate.sure(question, kept.question, kept.cosine)
        if sure is not None and sure > confidence:
            best, confidence = kept, sure
    return best, confidence
