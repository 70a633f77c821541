"""The owner thread of one model: takes commands, runs batches, hands a step's events to the event loop at once.

Everything llama.cpp has of this model is touched here alone, from the making of the context to its end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

from chorus.core.batching.batch import Chunk, Copy, Plan, Sequence
from chorus.core.batching.scheduler import BatchLimits, Scheduler, Sharing
from chorus.core.batching.speculation import PromptLookup, Source, Speculation
from chorus.core.errors import ChorusError, DrainingError, EngineError
from chorus.core.fleet.records import ModelLoad
from chorus.core.generation import Phase, Progress, Queued
from chorus.engine.llama.binding import Adapter, Model
from chorus.engine.llama.codes import batch_failed
from chorus.engine.llama.commands import (
    Cancel,
    Command,
    Embed,
    ForgetCache,
    Outbox,
    ReleaseAdapter,
    Stop,
    Submit,
)
from chorus.engine.llama.constraint import Masks
from chorus.engine.llama.context import Context, FloatArray
from chorus.engine.llama.drafting import Drafter, DraftRequest
from chorus.engine.llama.embedder import Embedder, text_limits
from chorus.engine.llama.embedding_queue import EmbeddingQueue
from chorus.engine.llama.job import Choice, Job
from chorus.engine.llama.pulse import Pulse
from chorus.engine.llama.ranking import Mask
from chorus.engine.llama.settings import LlamaSettings
from chorus.engine.llama.sizing import SCORED_ROWS, context_params, draft_params
from chorus.engine.llama.turns import Turns
from chorus.telemetry.logs import get_logger

_log = get_logger()

_STEPS_A_REPORT = 16


class Worker:
    """One model in memory. Made and called on the event loop; `load` may be read from any thread."""

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        context_length: int,
        embedding_length: int,
        settings: LlamaSettings,
        turns: Turns,
        failed: Callable[[ChorusError], None],
        draft: Model | None = None,
    ) -> None:
        """Takes the model over, and the one that drafts for it, and closes them at the end whatever happens.

        Each step is computed in one of `turns`. `failed` is called on the event loop if the thread dies after it was
        ready.
        """
        self._model = model
        self._draft_model = draft
        self._drafter: Drafter | None = None
        self._name = name
        self._settings = settings
        self._turns = turns
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._outbox = Outbox(self._loop)
        self._post = self._outbox.post
        self.pulse = Pulse()
        self._embeds = EmbeddingQueue(
            text_limits(model, embedding_length),
            lambda: Embedder(
                model,
                longest=embedding_length,
                threads=settings.thread_count(),
                flash_attention=settings.flash_attention,
            ),
            self._outbox,
            most_waiting=settings.max_queue,
            most_beside_streams=settings.prefill_tokens,
            gap_s=settings.gap_s,
            begins=self.pulse.begin,
        )
        self._context: Context | None = None
        self._choices: dict[Sequence, Choice] = {}
        self._jobs: set[Job] = set()
        self._masks = Masks(model.vocabulary_size, threads=settings.thread_count())
        self._allowed: dict[Choice, Mask] = {}
        self._constrained = 0  # choices with a form to keep to
        self._queue_changed = False
        self._in_hand: Command | None = None  # what the thread is carrying out
        self._over: ChorusError | None = None  # why no command is taken any more; the event loop's
        self._steps = 0
        self._params = context_params(settings, context_length, shares_prefixes=model.copies_prefixes)
        cells = self._params.cells
        self._generates = model.generates
        self._scheduler = Scheduler(
            BatchLimits(
                slots=settings.slots,
                cells=cells,
                batch_tokens=min(self._params.batch_tokens, cells),
                prefill_tokens=settings.prefill_tokens,
                outputs=self._params.outputs,
                waiting=settings.max_queue,
                cached=self._params.kept,
                gap_s=settings.gap_s,
            ),
            Sharing.PREFIX if model.copies_prefixes else Sharing.WHOLE,
            pair_share=model.cell_share,
        )
        # wrong guesses are taken back out of memory, which a state or a window cannot do
        guesses = settings.speculation and model.copies_prefixes
        self._speculation = Speculation(self._scheduler.times) if guesses else None
        self.load = self._load_report()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=f"llama-{name}", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hands over a command; from the event loop. Once the thread has ended it is answered with why that was."""
        if self._over is None:
            self._commands.put(command)
        else:
            _answer(command, self._over)

    def give_up(self, error: ChorusError) -> None:
        """The thread hangs: whatever is sent from now on is answered with `error`. From the event loop."""
        self._over = error

    async def stop(self) -> None:
        """Ends everything and joins the thread; streams end with `DrainingError`."""
        self._commands.put(Stop())
        await asyncio.shield(self.ended)
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: ChorusError | None = None
        try:
            if self._generates:
                self._context = Context(self._model, self._params)
                if self._draft_model is not None:
                    self._drafter = Drafter(self._model, self._draft_model, draft_params(self._params))
            self._post(self.ready.set_result, None)
            self._hand_over()
            while self._take_commands():
                self._step()
                self.pulse.end()
        except ChorusError as error:
            failure = error
        except BaseException as error:
            _log.exception("the engine's thread died", model=self._name)
            failure = EngineError(f"the engine of {self._name} failed: {type(error).__name__}")
        try:
            if failure is not None:
                self._post(self._settle_failed, failure)
            self._end_all(failure or DrainingError(f"{self._name} is being unloaded"))
            self._hand_over()
            self._embeds.close()
            if self._drafter is not None:
                self._drafter.close()
            elif self._draft_model is not None:
                self._draft_model.close()
            if self._context is not None:
                self._context.close()
            self._model.close()
        finally:
            self._post(self._end, None)
            self._hand_over()

    def _take_commands(self) -> bool:
        """Carries out what came; waits for something where there is nothing to do. Returns False at the end."""
        while True:
            waits = self._scheduler.idle and self._embeds.idle
            if not waits and self._commands.empty():
                return True
            if waits:
                self._carry_out()
                self._hand_over()
            command = self._in_hand = self._commands.get()
            if isinstance(command, Stop):
                return False
            if isinstance(command, Submit):
                self._submit(command.job)
            elif isinstance(command, Cancel):
                self._drop(command.job)
            elif isinstance(command, ForgetCache):
                self._scheduler.forget_cache()
                self._carry_out()
                self._outbox.settle(command.result, None)
            elif isinstance(command, ReleaseAdapter):
                self._release_adapter(command.adapter)
            else:
                self._embeds.take(command)
            self._in_hand = None
            self.load = self._load_report()

    def _submit(self, job: Job) -> None:
        sequences = job.sequences
        try:
            if sequences:
                self._scheduler.submit(sequences)
        except ChorusError as error:
            self._post(job.stream.push, error)
            return
        self._jobs.add(job)
        self._queue_changed = True
        for choice in job.choices:
            if choice.sequence is not None:
                self._choices[choice.sequence] = choice
                self._constrained += choice.matcher is not None
        if not sequences:  # everything was delivered already
            job.admit(time.monotonic())
            self._start(job)
            self._finish_if_done(job)

    def _release_adapter(self, adapter: Adapter) -> None:
        if self._context is not None and self._context.adapter is adapter:
            self._context.use_adapter(None)
        adapter.close()

    def _drop(self, job: Job, *, sound: bool = True) -> None:
        """Frees whatever a request holds; says nothing. Not `sound`: what it has in memory is not used again."""
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        for sequence in job.sequences:
            self._leave(sequence, sound=sound)
        for choice in job.choices:
            choice.sequence = None

    def _leave(self, sequence: Sequence, *, sound: bool = True) -> None:
        choice = self._choices.pop(sequence, None)
        self._constrained -= choice is not None and choice.matcher is not None
        self._queue_changed = True
        self._scheduler.leave(sequence, time.monotonic(), sound=sound)

    def _fail(self, job: Job, error: ChorusError) -> None:
        self._drop(job, sound=False)
        self._post(job.stream.push, error)

    def _end_all(self, error: ChorusError) -> None:
        """Answers everybody; the thread takes no commands any more. Asks nothing of what may have failed."""
        if isinstance(self._in_hand, Submit) and self._in_hand.job in self._jobs:
            self._in_hand = None
        self._post(self._close, error)
        for job in self._jobs:
            self._post(job.stream.push, error)
        self._jobs.clear()
        self._embeds.end(error)
        self.load = replace(self.load, slots_used=0, queued=0, kv_used_tokens=0)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if not self._embeds.idle:
            with self._turns.taken(self):
                self._embeds.step(streams=not self._scheduler.idle)
            self.pulse.end()  # a wait for the next turn is no step
            self.load = self._load_report()
            self._hand_over()
        if self._scheduler.idle:
            return
        self._guess()
        plan = self._scheduler.plan()
        self._report_queue()
        self._carry_out()
        if not plan.chunks:
            self._hand_over()
            return
        try:
            self._decode(plan)
        except ChorusError as error:
            # the sequences of this batch fail, and what llama.cpp has of them is removed; the others wait on
            for job in {self._choices[c.sequence].job for c in plan.chunks if c.sequence in self._choices}:
                self._fail(job, error)
        self._steps += 1
        if self._queue_changed or not self._steps % _STEPS_A_REPORT:
            self.load = self._load_report()

    def _carry_out(self) -> None:
        """Does to KV memory what the scheduler has decided."""
        context = self._context
        for operation in self._scheduler.operations() if context is not None else ():
            assert context is not None
            if isinstance(operation, Copy):
                context.copy(operation.source, operation.target, operation.count)
            else:
                context.trim(operation.slot, operation.length)

    def _guess(self) -> None:
        """Lets streams guess ahead where that pays."""
        speculation = self._speculation
        if speculation is None:
            return
        decoding = [sequence for sequence in self._scheduler.running if sequence.missing == 1]
        tokens, cells = len(decoding), self._scheduler.span
        drafter, wanted = self._drafter, []
        for sequence in decoding:
            choice = self._choices[sequence]
            if choice.lookup is None:
                choice.lookup = PromptLookup(choice.tokens)
            found = choice.lookup.propose(SCORED_ROWS)
            source, guess = found or (None, [])
            if choice.matcher is not None:
                guess = guess[: choice.matcher.fitting(guess)]
            count = speculation.count(source, tokens=tokens, cells=cells) if source and guess else 0
            if count:
                sequence.draft = guess[:count]
                choice.source = source
            elif drafter is not None and not sequence.draft:  # one whose turn has not come yet has its guess already
                cost_s = drafter.step_s / len(decoding)  # which they share
                count = speculation.count(Source.DRAFT_MODEL, tokens=tokens, cells=cells, cost_s=cost_s)
                if count and sequence.slot is not None:
                    wanted.append((choice, DraftRequest(sequence.slot, sequence.tokens, count)))
            tokens += count
        if wanted:
            self._ask_drafter(wanted)

    def _ask_drafter(self, wanted: list[tuple[Choice, DraftRequest]]) -> None:
        """Lets the draft model guess; one that fails is given up, as streams go on without it."""
        drafter = self._drafter
        assert drafter is not None
        try:
            with self._turns.taken(self):
                self.pulse.begin(len(wanted), "guesses")
                guesses = drafter.propose([request for _, request in wanted])
        except ChorusError as error:
            _log.warning("draft model given up", model=self._name, why=error.message)
            self._drafter = None
            drafter.close()
            return
        finally:
            self.pulse.end()
        for (choice, _), guess in zip(wanted, guesses, strict=True):
            if guess and choice.sequence is not None:
                choice.sequence.draft = guess
                choice.source = Source.DRAFT_MODEL

    def _decode(self, plan: Plan) -> None:
        context = self._context
        assert context is not None
        assert plan.lane is None or isinstance(plan.lane, Adapter)
        context.use_adapter(plan.lane)
        count = self._fill(context, plan.chunks)
        outputs = sum([chunk.outputs + len(chunk.draft) for chunk in plan.chunks])
        self._hand_over()  # the event loop tells what the last step gave while this one is computed
        with self._turns.taken(self):
            self.pulse.begin(count)
            began = time.monotonic()
            code = context.decode(count)
            if code:
                raise batch_failed(code, count)
            rows = context.logits(outputs) if outputs else None  # where a graphics device computes, it is waited for
        self._scheduler.stepped(plan, time.monotonic() - began)
        self._compute_masks(plan.chunks)
        first = 0
        for chunk in plan.chunks:
            last = first + chunk.outputs + len(chunk.draft)
            self._progress(chunk, rows[first:last] if rows is not None else None)
            first = last

    def _fill(self, context: Context, chunks: tuple[Chunk, ...]) -> int:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            start, count, slot = chunk.start, chunk.count, chunk.sequence.slot
            assert slot is not None
            if count == 1 and not chunk.draft:
                ids.append(chunk.sequence.tokens[start])
                positions.append(start)
                slots.append(slot)
                wanted.append(chunk.outputs)
                continue
            ids += chunk.sequence.tokens[start : start + count]
            ids += chunk.draft
            guessed = len(chunk.draft)
            positions += range(start, start + count + guessed)
            slots += [slot] * (count + guessed)
            wanted += [0] * (count - chunk.outputs) + [1] * (chunk.outputs + guessed)
        return context.fill(ids, positions, slots, wanted)

    def _compute_masks(self, chunks: tuple[Chunk, ...]) -> None:
        """Finds out, for all at once, what the constrained choices of a batch may say next."""
        if not self._constrained:
            self._allowed.clear()
            return
        found = [self._choices.get(chunk.sequence) for chunk in chunks if chunk.outputs]
        matchers = {choice: choice.matcher for choice in found if choice is not None and choice.matcher is not None}
        self._allowed = dict(zip(matchers, self._masks.compute(list(matchers.values())), strict=True))

    def _progress(self, chunk: Chunk, rows: FloatArray | None) -> None:
        """A chunk of a sequence was computed; `rows` are its logits."""
        choice = self._choices.get(chunk.sequence)
        if choice is None:  # a sibling's failure ended its request in this very step
            return
        job = choice.job
        complete = self._scheduler.computed(chunk)
        try:
            if rows is not None and chunk.start < chunk.sequence.scores:
                if not job.started:
                    for place, row in enumerate(rows):
                        job.score(row, chunk.start + place)
                    if not job.scored:
                        self._tell_progress(job, chunk)
                    elif complete or job.holds:  # others have drawn already, and what they drew comes after the scores
                        self._start(job)
                if complete:  # there was nothing to do but to score the prompt
                    self._end_choice(choice)
            elif complete:
                assert rows is not None
                self._draw(choice, rows, chunk)
            elif not job.started and chunk.count > 1:
                self._tell_progress(job, chunk)
        except ChorusError as error:
            self._fail(job, error)
        except Exception as error:  # a defect met by one request must not end those of the others
            _log.exception("a request failed the engine", model=self._name)
            self._fail(job, EngineError(f"{self._name} could not go on with this request ({type(error).__name__})"))

    def _tell_progress(self, job: Job, chunk: Chunk) -> None:
        self._post(job.stream.push, Progress(Phase.PREFILL, chunk.sequence.computed, chunk.sequence.known))

    def _draw(self, choice: Choice, rows: FloatArray, chunk: Chunk) -> None:
        """Draws the next token, and those after it for as long as each was guessed."""
        draft = chunk.draft
        first = len(rows) - 1 - len(draft)
        kept = 0
        self._draw_one(choice, rows[first])
        while kept < len(draft) and choice.tokens[-1] == draft[kept] and choice.completion.reason is None:
            kept += 1
            self._draw_one(choice, rows[first + kept])
        if draft:
            # what was drawn last is in memory as well where it was guessed, but its end came first
            self._scheduler.checked(chunk, kept)
            assert self._speculation is not None
            assert choice.source is not None
            self._speculation.learn(choice.source, len(draft), kept)
        assert choice.sequence is not None
        if choice.completion.reason is not None:
            self._end_choice(choice)
        elif (keep := choice.shift() if choice.job.request.context_shift else None) is not None:
            self._scheduler.rewind(choice.sequence, keep)

    def _draw_one(self, choice: Choice, row: FloatArray) -> None:
        job, index = choice.job, choice.completion.count
        mask = self._allowed.pop(choice, None)
        if choice.matcher is not None:
            mask = self._masks.one(choice.matcher) if mask is None else mask  # none is made ahead for guesses
            choice.matcher.check()
        token_id = choice.sampler.draw(row, index, mask)
        logprobs = () if job.request.logprobs is None else (job.logprob(row, token_id, job.request.logprobs),)
        if not job.started and job.scored:
            self._start(job)
        job.drew()
        push = job.stream.push
        for delta in choice.take(token_id, logprobs):
            if job.started:
                self._post(push, delta)
            else:
                job.hold(delta)

    def _start(self, job: Job) -> None:
        for event in job.start(time.monotonic()):
            self._post(job.stream.push, event)

    def _end_choice(self, choice: Choice) -> None:
        sequence, choice.sequence = choice.sequence, None
        assert sequence is not None
        self._leave(sequence)
        self._finish_if_done(choice.job)

    def _finish_if_done(self, job: Job) -> None:
        if not job.sequences:
            self._jobs.discard(job)
            self._post(job.stream.push, job.finish(time.monotonic()))

    def _report_queue(self) -> None:
        """Notes who was admitted, and tells those who wait where they stand, whenever that changed."""
        if not self._queue_changed:
            return
        self._queue_changed = False
        now = time.monotonic()
        for sequence in self._scheduler.running:
            self._choices[sequence].job.admit(now)
        for position, job in enumerate(self._scheduler.waiting_groups()):
            assert isinstance(job, Job)
            if job.position != position and not job.started:
                job.position = position
                wait_s = self._scheduler.room.rate.wait_s(position + 1)
                self._post(job.stream.push, Queued(position, wait_s))

    def _load_report(self) -> ModelLoad:
        scheduler = self._scheduler
        used = scheduler.used_cells
        return ModelLoad(
            self._name,
            len(scheduler.running),
            scheduler.limits.slots,
            len(scheduler.room) + len(self._embeds),
            used,
            scheduler.limits.cells if self._generates else 0,
            scheduler.times.decode_rate,
            scheduler.tree.cells - used,
            scheduler.times.prefill_rate,
            scheduler.preemptions,
        )

    # --- back to the event loop ---------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        if not self._outbox.hand_over():
            self._commands.put(Stop())

    def _close(self, error: ChorusError) -> None:
        """On the event loop, where commands come from: none is put into the queue after this."""
        self._over = self._over or error
        if self._in_hand is not None:  # the thread died of it
            _answer(self._in_hand, self._over)
        while not self._commands.empty():
            _answer(self._commands.get(), self._over)

    def _end(self, _: None) -> None:
        self._outbox.close()
        self.ended.set_result(None)

    def _settle_failed(self, error: ChorusError) -> None:
        if self.ready.done():
            self._failed(error)
        else:
            self.ready.set_exception(error)


def _answer(command: Command, error: ChorusError) -> None:
    """On the event loop: says that a command is not carried out, to whoever waits for that."""
    if isinstance(command, Submit):
        command.job.stream.push(error)
    elif isinstance(command, Embed) and not command.result.done():
        command.result.set_exception(error)
    elif isinstance(command, ForgetCache) and not command.result.done():
        command.result.set_result(None)  # it went with the model
