"""The owner thread of one model: takes commands, runs batches, hands a step's events to the event loop at once.

Everything llama.cpp has of this model is touched here alone, from the making of the context to its end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import structlog

from chorus.core.batching.scheduler import BatchLimits, Chunk, Plan, Scheduler, Sequence
from chorus.core.errors import ChorusError, DrainingError, EngineError
from chorus.core.fleet.records import ModelLoad
from chorus.core.generation import Phase, Progress, Queued
from chorus.engine.llama.binding import Model
from chorus.engine.llama.commands import Cancel, Command, Embed, Outbox, Stop, Submit
from chorus.engine.llama.context import Context, ContextParams, FloatArray
from chorus.engine.llama.embedder import Embedder
from chorus.engine.llama.job import Choice, Job
from chorus.engine.llama.settings import LlamaSettings

_log = structlog.get_logger("chorus.engine.llama")
_SCORED_ROWS = 32  # positions of prompts scored in one batch
_SMOOTHING = 0.1


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
        failed: Callable[[ChorusError], None],
    ) -> None:
        """Takes the model over, and closes it at the end whatever happens.

        `failed` is called on the event loop if the thread dies after it was ready.
        """
        self._model = model
        self._name = name
        self._settings = settings
        self._embedding_length = embedding_length
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._outbox = Outbox(self._loop)
        self._post = self._outbox.post
        self._embeds: deque[Embed] = deque()
        self._embedder: Embedder | None = None
        self._context: Context | None = None
        self._choices: dict[Sequence, Choice] = {}
        self._jobs: set[Job] = set()
        self._queue_changed = False
        self._rate = 0.0
        cells = max(settings.kv_tokens or settings.slots * context_length, context_length, settings.slots)
        self._params = ContextParams(
            cells=cells,
            batch_tokens=max(settings.batch_tokens, settings.slots),
            micro_batch_tokens=max(settings.batch_tokens, settings.slots),
            sequences=settings.slots,
            outputs=max(settings.slots, _SCORED_ROWS),
            threads=settings.thread_count(),
            threads_batch=settings.thread_count(),
            flash_attention=settings.flash_attention,
        )
        self._generates = model.generates
        self._scheduler = Scheduler(
            BatchLimits(
                slots=settings.slots,
                cells=cells,
                batch_tokens=min(self._params.batch_tokens, cells),
                prefill_tokens=settings.prefill_tokens,
                outputs=self._params.outputs,
                waiting=settings.max_queue,
            ),
            share_prefixes=model.copies_prefixes,
        )
        self.load = self._load_report()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=f"llama-{name}", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hands over a command; from the event loop."""
        self._commands.put(command)

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
            self._post(self.ready.set_result, None)
            self._hand_over()
            while self._take_commands():
                self._step()
                self._hand_over()
            self._end_all(DrainingError(f"{self._name} is being unloaded"))
        except ChorusError as error:
            failure = error
        except BaseException as error:
            _log.exception("the engine's thread died", model=self._name)
            failure = EngineError(f"the engine of {self._name} failed: {type(error).__name__}")
        try:
            if failure is not None:
                self._post(self._settle_failed, failure)
                self._end_all(failure)
                self._hand_over()
            if self._embedder is not None:
                self._embedder.close()
            if self._context is not None:
                self._context.close()
            self._model.close()
        finally:
            self._post(self.ended.set_result, None)
            self._hand_over()

    def _take_commands(self) -> bool:
        """Carries out what came; waits for something where there is nothing to do. Returns False at the end."""
        while True:
            waits = self._scheduler.idle and not self._embeds
            if not waits and self._commands.empty():
                return True
            command = self._commands.get()
            if isinstance(command, Stop):
                return False
            if isinstance(command, Submit):
                self._submit(command.job)
            elif isinstance(command, Cancel):
                self._drop(command.job)
            else:
                self._embeds.append(command)
            self.load = self._load_report()
            if self._outbox and self._scheduler.idle:
                self._hand_over()

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
        if not sequences:  # everything was delivered already
            job.admit(time.monotonic())
            self._start(job)
            self._finish_if_done(job)

    def _drop(self, job: Job) -> None:
        """Frees whatever a request holds; says nothing."""
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        for sequence in job.sequences:
            self._leave(sequence)
        for choice in job.choices:
            choice.sequence = None

    def _leave(self, sequence: Sequence) -> None:
        self._choices.pop(sequence, None)
        self._queue_changed = True
        slot = self._scheduler.leave(sequence, time.monotonic())
        if slot is not None and self._context is not None:
            self._context.remove(slot)

    def _fail(self, job: Job, error: ChorusError) -> None:
        self._drop(job)
        self._post(job.stream.push, error)

    def _end_all(self, error: ChorusError) -> None:
        for job in list(self._jobs):
            self._fail(job, error)
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, Submit):
                self._post(command.job.stream.push, error)
            elif isinstance(command, Embed):
                self._embeds.append(command)
        for embed in self._embeds:
            self._outbox.settle(embed.result, error)
        self._embeds.clear()
        self.load = self._load_report()

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._embeds:
            self._embed(self._embeds.popleft())
        if self._scheduler.idle:
            return
        plan = self._scheduler.plan()
        self._report_queue()
        if not plan.chunks:
            return
        try:
            self._decode(plan)
        except ChorusError as error:
            # the sequences of this batch fail, and what llama.cpp has of them is removed; the others wait on
            targets = {copy.target for copy in plan.copies}
            affected = {chunk.sequence for chunk in plan.chunks}
            affected |= {sequence for sequence in self._scheduler.running if sequence.slot in targets}
            for job in {self._choices[sequence].job for sequence in affected if sequence in self._choices}:
                self._fail(job, error)
        self.load = self._load_report()

    def _decode(self, plan: Plan) -> None:
        context = self._context
        assert context is not None
        for copy in plan.copies:
            context.copy(copy.source, copy.target, copy.count)
        count = self._fill(context, plan.chunks)
        began = time.monotonic()
        code = context.decode(count)
        if code:
            raise EngineError(f"llama.cpp could not compute a batch of {count} tokens (code {code})")
        outputs = sum(chunk.outputs for chunk in plan.chunks)
        rows = context.logits(outputs) if outputs else None
        ended = time.monotonic()
        if len(plan.chunks) == count:  # nothing but decoding: what a stream moves at
            self._rate += (1.0 / max(ended - began, 1e-6) - self._rate) * (_SMOOTHING if self._rate else 1.0)
        first = 0
        for chunk in plan.chunks:
            last = first + chunk.outputs
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
            if count == 1:
                ids.append(self._choices[chunk.sequence].tokens[start])
                positions.append(start)
                slots.append(slot)
                wanted.append(chunk.outputs)
                continue
            ids += self._choices[chunk.sequence].tokens[start : start + count]
            positions += range(start, start + count)
            slots += [slot] * count
            wanted += [0] * (count - chunk.outputs) + [1] * chunk.outputs
        count = len(ids)
        context.token_ids[:count] = ids
        context.positions[:count] = positions
        context.sequence_ids[:count] = slots
        context.wants_output[:count] = wanted
        return count

    def _progress(self, chunk: Chunk, rows: FloatArray | None) -> None:
        """A chunk of a sequence was computed; `rows` are its logits."""
        choice = self._choices.get(chunk.sequence)
        if choice is None:  # a sibling's failure ended its request in this very step
            return
        job = choice.job
        complete = self._scheduler.computed(chunk)
        try:
            if rows is not None and chunk.start < chunk.sequence.scores:
                for place, row in enumerate(rows):
                    job.score(row, chunk.start + place)
                if complete:  # there was nothing to do but to score the prompt
                    self._start(job)
                    self._end_choice(choice)
            elif complete:
                assert rows is not None
                self._draw(choice, rows[-1])
            elif not job.started and chunk.count > 1:
                self._post(job.stream.push, Progress(Phase.PREFILL, chunk.sequence.computed, chunk.sequence.known))
        except ChorusError as error:
            self._fail(job, error)
        except Exception as error:  # a defect met by one request must not end those of the others
            _log.exception("a request failed the engine", model=self._name)
            self._fail(job, EngineError(f"{self._name} could not go on with this request ({type(error).__name__})"))

    def _draw(self, choice: Choice, row: FloatArray) -> None:
        job, index = choice.job, choice.completion.count
        token_id = choice.sampler.draw(row, index)
        logprobs = () if job.request.logprobs is None else (job.logprob(row, token_id, job.request.logprobs),)
        if not job.started:
            self._start(job)
        job.drew()
        push = job.stream.push
        for delta in choice.take(token_id, logprobs):
            self._post(push, delta)
        assert choice.sequence is not None
        if choice.completion.reason is None:
            self._scheduler.extend(choice.sequence)
        else:
            self._end_choice(choice)

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
            if job.position != position:
                job.position = position
                wait_s = self._scheduler.room.rate.wait_s(position + 1)
                self._post(job.stream.push, Queued(position, wait_s))

    def _embed(self, command: Embed) -> None:
        try:
            if self._embedder is None:
                self._embedder = Embedder(
                    self._model, longest=self._embedding_length, threads=self._settings.thread_count()
                )
            vector = self._embedder.vector(command.token_ids, normalize=command.normalize)
            self._outbox.settle(command.result, vector.tolist())
        except ChorusError as error:
            self._outbox.settle(command.result, error)

    def _load_report(self) -> ModelLoad:
        scheduler = self._scheduler
        running = scheduler.running
        return ModelLoad(
            self._name,
            len(running),
            scheduler.limits.slots,
            len(scheduler.room),
            sum([sequence.computed for sequence in running]),
            scheduler.limits.cells if self._generates else 0,
            self._rate,
        )

    # --- back to the event loop ---------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        if not self._outbox.hand_over():
            self._commands.put(Stop())

    def _settle_failed(self, error: ChorusError) -> None:
        if self.ready.done():
            self._failed(error)
        else:
            self.ready.set_exception(error)
