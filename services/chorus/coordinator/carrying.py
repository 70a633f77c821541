"""One generation over all of its attempts: what each is asked for, and what the caller is told when one takes over.

The first attempt gets the caller's request as it is. Those after a break get it with every token id delivered so far,
the seed that the first one drew, and the artifact that it ran; the engine replays the ids, so grammar, stop strings,
penalties and half characters go on where they were. Finished then tells of the whole answer, not of its last part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.events import EventBoard
from chorus.core.costs import Bill, Tab
from chorus.core.events import AttemptResumed
from chorus.core.fleet.records import Feature
from chorus.core.generation import GenerationRequest
from chorus.core.placement import Candidate, FallingBack, Needs
from chorus.core.resilience.delivered import Delivered
from chorus.telemetry.logs import get_logger
from chorus.wire.fallback import encode_substitution
from chorus.wire.resources import encode_duration
from chorus.wire.whole import ask_to_go_on, check_counts, tell_whole

_ATTEMPT_MAX = 2**32 - 1  # what the field holds; callers may begin there

_log = get_logger()


class Carrying:
    """What a coordinator remembers of a generation. `clock` is monotonic seconds, `arrived` when the request came."""

    def __init__(
        self,
        spec: generation_pb2.GenerationSpec,
        request: GenerationRequest,
        *,
        needs: Needs,
        falling_back: FallingBack,
        first_attempt: int,
        arrived: float,
        clock: Callable[[], float],
        time_left: Callable[[], float | None],
        events: EventBoard,
        tab: Tab,
    ) -> None:
        """`request` is what `spec` says, decoded, and `needs` what it needs; these change where another model answers,
        as `falling_back` says. `first_attempt` is how the caller counts the first one. `tab` is what it owes providers.

        `time_left` is in seconds, None without a deadline, and raises DeadlineExceededError after it.
        """
        self._spec = spec
        self._request = request
        self._first_attempt = max(1, first_attempt)
        self._arrived = arrived
        self._clock = clock
        self.time_left = time_left
        self._events = events
        self._tab = tab
        self.delivered = Delivered.of(request)
        self.needs = needs
        self.falling_back = falling_back
        self._began_on: Candidate | None = None  # where the first token came from
        self._now_on: Candidate | None = None
        self._number = 0
        self._seed: int | None = None
        self._why = ""
        self._silent_since = arrived
        self._tokens_before = 0  # the last break
        self._given = 0  # tokens of the answer before the attempt under way
        self._asks_nothing = False  # all of them had been delivered before it

    @property
    def begun(self) -> bool:
        """Whether the caller has got part of the answer."""
        return self.delivered.started

    @property
    def tokens(self) -> int:
        """How many tokens the caller has got."""
        return self.delivered.output_tokens

    @property
    def obstacle(self) -> str:
        """Why nobody else can go on with it; empty where somebody can."""
        return self.delivered.obstacle

    def attempt(self, candidate: Candidate, number: int) -> runner_pb2.GenerateRequest:
        """The request for the next attempt, counted from 1."""
        if not self.begun:
            self._began_on = candidate
        self._now_on, self._number = candidate, number
        features = candidate.model.features
        self.delivered.begin(with_ids=Feature.TOKEN_IDS in features, can_resume=Feature.RESUME in features)
        message = runner_pb2.GenerateRequest(spec=self._spec, attempt=self._attempt_number())
        spec = message.spec
        spec.model = candidate.model.artifact.name
        if self.begun:
            sha256 = candidate.model.artifact.sha256
            ask_to_go_on(spec, self.delivered, seed=self._seed, artifact_sha256=sha256)
        self._given = self.delivered.token_total
        # Before its first token an attempt gets what the caller said, with as many tokens as that says.
        so_far = replace(self._request, resume=self.delivered.choices()) if self.begun else self._request
        self._asks_nothing = bool(so_far.resume) and so_far.choice_count == 1 and so_far.tokens_left == 0
        return message

    def broken(self, reason: str) -> Needs:
        """What going on elsewhere needs, now that an attempt has ended for `reason`."""
        self._why = reason
        self._tokens_before = self.delivered.output_tokens
        if self.delivered.last_at is not None:
            self._silent_since = self.delivered.last_at
        return self.needs_elsewhere()

    def needs_elsewhere(self) -> Needs:
        """What somebody else needs to go on with it: the very same artifact, once something was delivered."""
        request, began_on = self._request, self._began_on
        if not self.begun or began_on is None:
            return self.needs
        sha256 = began_on.model.artifact.sha256
        needs = Needs.of_generation(
            replace(
                request,
                # Files of equal content may have another name elsewhere; where there is no digest, the name must do.
                model="" if sha256 else began_on.model.artifact.name,
                prompt_logprobs=None,
                resume=self.delivered.choices(),
                allow_text_resume=self.delivered.from_text,
                sampling=request.sampling if self._seed is None else replace(request.sampling, seed=self._seed),
                requirements=replace(request.requirements, artifact_sha256=sha256),
            )
        )
        # A paid provider may go on where it might have begun: the artifact's name here is ours, not the caller's.
        return replace(needs, allow_external=self.needs.allow_external)

    # --- what the relay tells and asks ------------------------------------------------------------------------------

    def started(self, message: runner_pb2.GenerateResponse) -> None:
        """Notes what the attempt with the first token says of the prompt and the seed."""
        if (bill := self._bill) is not None:
            bill.began = True
        if self.begun or self._began_on is None:
            return
        told = message.event.started
        self.delivered.prompt_tokens = told.prompt_token_count
        self.delivered.cached_tokens = told.cached_token_count
        given = self._request.sampling.seed is not None
        self._seed = told.seed if not given and Feature.SEED in self._began_on.model.features else None

    def substituted(self) -> bytes | None:
        """Substitution, where another model answers than the one asked for."""
        found = self.falling_back.substitution
        if found is None or self._why:
            return None
        return pb.GenerateResponse(substitution=encode_substitution(found)).SerializeToString()

    def taken_over(self) -> bytes | None:
        """AttemptChanged, where this attempt goes on with what another one began."""
        now_on = self._now_on
        if not self._why or now_on is None:
            return None
        gap_s = max(0.0, self._clock() - self._silent_since)
        _log.info(
            "attempt.resumed",
            attempt=self._number,
            runner_id=now_on.runner_id,
            reason=self._why,
            gap_s=round(gap_s, 6),
            output_tokens=self._tokens_before,
        )
        self._events.of_attempt(AttemptResumed(self._number, self._why, gap_s, self._tokens_before), now_on)
        changed = generation_pb2.AttemptChanged(
            attempt=self._attempt_number(),
            node_id=now_on.node_id,
            runner_id=now_on.runner_id,
            reason=self._why,
            gap=encode_duration(gap_s),
            from_text=self.delivered.from_text,
        )
        return runner_pb2.GenerateResponse(
            event=generation_pb2.GenerationEvent(attempt_changed=changed)
        ).SerializeToString()

    def finished(self, message: runner_pb2.GenerateResponse) -> bytes | None:
        """Finished for the whole answer. Raises EngineError where the runner has said less than it says it has."""
        delivered, finished = self.delivered, message.event.finished
        counts = check_counts(finished, delivered)
        if (bill := self._bill) is not None:
            bill.told(finished.usage.prompt_token_count, sum(counts) - self._given)
            bill.refused = self._asks_nothing  # its runner says that the answer is whole, and asks nobody
        if not self._why:
            delivered.prompt_tokens = finished.usage.prompt_token_count
            delivered.cached_tokens = finished.usage.cached_token_count
            if not self._tab.bills:
                return None
        else:
            tell_whole(finished, counts, delivered, arrived=self._arrived)
        finished.usage.cost_micro_usd = self._tab.cost
        return message.SerializeToString()

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _bill(self) -> Bill | None:
        """That of the attempt under way; None where it costs nothing."""
        return self._tab.latest(self._now_on.runner_id) if self._now_on is not None else None

    def _attempt_number(self) -> int:
        return min(self._first_attempt + self._number - 1, _ATTEMPT_MAX)
