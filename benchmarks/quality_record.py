"""What each model says to each item, recorded once: everything else of the quality benchmark is computed from that.

A recording is a file of JSON lines, flushed after each few items, so that a run which is broken off goes on where it
stopped. Answers are drawn as the engine draws them (its context, its sampler), but as a tree: answers that begin
alike are decoded once, and so are the shots that a family's items share. That is several times as cheap as asking for
each answer by itself, which matters here alone.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chorus.core.generation import Sampling
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context, ContextParams, FloatArray
from chorus.engine.llama.ranking import largest, log_normalizer
from chorus.engine.llama.sampling import Sampler
from chorus.eval.dataset import Item

MOST_TOKENS = 12
SAMPLES = 5
CHUNK = 24  # items of one family
DRAWN = Sampling()  # as an ensemble draws where the caller asked for the likeliest words


@dataclass(slots=True)
class Output:
    """One answer: its text to the end of the line, its tokens' log-probabilities, and that of its end.

    `margin`: by how much the first token was ahead of the second likeliest.
    """

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    end: float = 0.0
    margin: float = 0.0


def record(models: Mapping[str, Path], items: Sequence[Item], place: Path, *, threads: int) -> None:
    """Records every item that `place` lacks, families in turns, and says how far it is."""
    readers = {name: Reader(path, threads=threads) for name, path in models.items()}
    append(items, place, lambda chunk: _record(readers, chunk))


def append(
    items: Sequence[Item],
    place: Path,
    lines_for: Callable[[Sequence[Item]], Iterable[Mapping[str, Any]]],
    *,
    size: int = CHUNK,
) -> None:
    """Appends the lines that `lines_for` makes of every item that `place` lacks, `size` items of a family at a time."""
    known = {line["id"] for line in read(place)}
    began, done = time.monotonic(), 0
    with place.open("a", encoding="utf-8") as file:
        for chunk in _chunks(items, size):  # as ever, so that what goes on takes families in turns, too
            if not (todo := [item for item in chunk if item.id not in known]):
                continue
            for line in lines_for(todo):
                file.write(json.dumps(line) + "\n")
            file.flush()
            done += len(todo)
            pace, cpu = (time.monotonic() - began) / done, time.process_time() / done
            print(f"{len(known) + done} of {len(items)} items, {pace:.2f} s each, {cpu:.2f} s of CPU", flush=True)


def read(place: Path) -> list[dict[str, Any]]:
    """The lines of a recording."""
    return lines_of(place.read_text(encoding="utf-8")) if place.exists() else []


def lines_of(written: str) -> list[dict[str, Any]]:
    """What is written, of each item the first line: two runs at once record some items twice, and one that counted
    twice would make intervals too narrow. A last line that was cut off is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, written.split("\n")[:-1]):
        found.setdefault(line["id"], line)
    return list(found.values())


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """A few items of one family at a time, families in turns: a recording that was broken off has some of all."""
    waiting: dict[str, list[Item]] = {}
    for item in items:
        waiting.setdefault(item.family, []).append(item)
    while any(waiting.values()):
        for family, left in waiting.items():
            if left:
                yield left[:size]
                waiting[family] = left[size:]


def _record(readers: Mapping[str, Reader], chunk: Sequence[Item]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"id": item.id, "family": item.family, "split": item.split, "answers": item.answers, "outputs": {}}
        for item in chunk
    ]
    for name, reader in readers.items():
        for line, (greedy, *drawn) in zip(lines, reader.answers([item.prompt for item in chunk]), strict=True):
            line["outputs"][name] = {"greedy": asdict(greedy), "samples": [asdict(output) for output in drawn]}
    return lines


@dataclass(slots=True)
class _Walk:
    """One answer on its way: of which item, where its tokens lie, and what draws the next one."""

    item: int
    sampler: Sampler | None
    output: Output = field(default_factory=Output)
    ids: tuple[int, ...] = ()
    done: bool = False


class Reader:
    """One model that answers a chunk of at most `size` prompts: to each the likeliest answer, and `samples` others."""

    def __init__(self, path: Path, *, threads: int, samples: int = SAMPLES, size: int = CHUNK) -> None:
        self._model = Model(path)
        self._ends = self._model.end_tokens()
        self._samples = samples
        sequences = 1 + size * (1 + 1 + samples)  # what is shared, the prompts, and as many answers as may differ
        self._context = Context(
            self._model, ContextParams(6144, 512, 512, sequences, sequences, threads, threads)
        )  # fmt: skip
        self._lengths: list[int] = []
        self._roots: list[FloatArray] = []

    def answers(self, prompts: Sequence[str]) -> list[list[Output]]:
        """To each prompt the likeliest answer, then those that were drawn."""
        self._read(prompts)
        walks = [
            _Walk(
                item,
                None
                if choice < 0
                else Sampler(DRAWN, seed=zlib.crc32(prompts[item].encode()), choice=choice, history=()),
            )
            for item in range(len(prompts))
            for choice in range(-1, self._samples)
        ]
        rows = {(item, ()): row for item, row in enumerate(self._roots)}
        places: dict[tuple[int, tuple[int, ...]], int] = {}
        free = list(range(1 + len(prompts), self._context.sequences))
        while open_walks := [walk for walk in walks if not walk.done]:
            for walk in open_walks:
                self._step(walk, rows[walk.item, walk.ids])
            nodes = list(dict.fromkeys((walk.item, walk.ids) for walk in open_walks if not walk.done))
            fresh: dict[tuple[int, tuple[int, ...]], int] = {}
            for item, ids in reversed(nodes):  # of the answers that part here, the first keeps the place of all
                parent = places.get((item, ids[:-1]), 1 + item)
                if parent > len(prompts) and all(
                    place[1][:-1] != ids[:-1] or place[0] != item for place in nodes[: nodes.index((item, ids))]
                ):
                    fresh[item, ids] = parent
                    continue
                fresh[item, ids] = target = free.pop()
                self._context.copy(parent, target, self._lengths[item] + len(ids) - 1)
            gone = set(places.values()) - set(fresh.values())
            for sequence in gone:
                self._context.remove(sequence)
            free += gone
            places = fresh
            if nodes:
                rows = dict(zip(nodes, self._decode([
                    (ids[-1], self._lengths[item] + len(ids) - 1, fresh[item, ids], 1) for item, ids in nodes
                ]), strict=True))  # fmt: skip
        for sequence in places.values():
            self._context.remove(sequence)
        count = 1 + self._samples
        return [[walk.output for walk in walks[at : at + count]] for at in range(0, len(walks), count)]

    def _read(self, prompts: Sequence[str]) -> None:
        """Reads all prompts, what they share once; sequence 0 is that, and the next ones are theirs."""
        for sequence in range(self._context.sequences):
            self._context.remove(sequence)
        tokens = [self._model.tokenize(prompt, add_special=True, parse_special=False) for prompt in prompts]
        shared = 0
        while len({tuple(ids[: shared + 1]) for ids in tokens}) == 1 and shared + 1 < min(map(len, tokens)):
            shared += 1
        self._decode([(token_id, place, 0, 0) for place, token_id in enumerate(tokens[0][:shared])])
        entries = []
        for item, ids in enumerate(tokens):
            self._context.copy(0, 1 + item, shared)
            entries += [
                (token_id, place, 1 + item, int(place == len(ids) - 1))
                for place, token_id in enumerate(ids[shared:], shared)
            ]
        self._roots = self._decode(entries)
        self._lengths = [len(ids) for ids in tokens]

    def _decode(self, entries: Sequence[tuple[int, int, int, int]]) -> list[FloatArray]:
        """The logits of all entries (token, position, sequence, wanted) that are wanted, in order."""
        rows: list[FloatArray] = []
        size = min(self._context.batch_tokens, self._context.outputs)
        for at in range(0, len(entries), size):
            ids, positions, sequences, wanted = (list(column) for column in zip(*entries[at : at + size], strict=True))
            if self._context.decode(self._context.fill(ids, positions, sequences, wanted)):
                raise SystemExit("llama.cpp could not decode a batch")
            if any(wanted):
                rows += list(self._context.logits(sum(wanted)).copy())
        return rows

    def _step(self, walk: _Walk, row: FloatArray) -> None:
        output, place = walk.output, len(walk.ids)
        token_id = int(np.argmax(row)) if walk.sampler is None else walk.sampler.draw(row, place)
        if place == 0 and walk.sampler is None:
            _, values = largest(row, 2)
            output.margin = round(float(values[0] - values[1]), 4)
        text = self._model.detokenize([*walk.ids, token_id], show_special=False)
        logprob = round(_logprob(row, token_id), 4)
        if token_id in self._ends or "\n" in text:
            output.end, walk.done = logprob, True
            return
        output.text = text
        output.logprobs.append(logprob)
        walk.ids = (*walk.ids, token_id)
        walk.done = len(walk.ids) >= MOST_TOKENS


def _logprob(row: FloatArray, token_id: int) -> float:
    return float(row[token_id]) - log_normalizer(row)
