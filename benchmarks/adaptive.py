"""Twelve members always, or as many as the question needs: time, quality, and what the machines are busy with.

    make bench ONLY=adaptive        an hour or two; may be broken off, and goes on where it was

A registry, a coordinator and three runners, each a process of its own, over mutual TLS. Each runner has two models,
SmolLM2-135M-Instruct and Gemma 3 270M, each in two quantizations made here; each of the four files is asked in three
ways, which makes twelve members. "All twelve" is a vote that waits for them all. "Adaptive" is `auto` and names nobody:
the complexity of the question says how many may think, of models whose answers are weighed each is asked once, and a
vote that is settled ends. Items are those of the test half of `quality_items.py`, tasks in turns; each is answered both
ways, one after the other, the first one in turns, too.

That tells time and utilisation. So few items can't tell small differences in quality, so that is judged on many more,
for which every member's answer is recorded without a mesh (`adaptive_record.py`) and given to the code that the
coordinator runs. Where a runner has both files of a model, placement chooses one by load: `auto` is given the answers
of each as often as it was live. How many recorded answers are those that were given live is told, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import platformdirs
import quality
import quality_items
import quality_record
import structlog
from adaptive_record import answer_of, offers_of, record, replayed
from figures import Bar, geometric_mean, percentile, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, Processes, machine, processes_in, say
from servers import cores

from chorus.client import MemberEvent, MeshClient, StartedAt, Verdict, ensemble_spec
from chorus.core.ensemble.answers import normalise
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.planning import Policy, plan
from chorus.core.ensemble.records import EnsembleSpec, MemberSpec, MemberState
from chorus.core.ensemble.steps import Task
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt, TokenDelta
from chorus.engine.llama.binding import quantize
from chorus.eval.dataset import Item
from chorus.eval.scoring import is_right
from chorus.eval.statistics import clopper_pearson, paired_difference
from chorus.models.naming import GGUF_SUFFIX, family_of_file, stem_of
from chorus.testing.packaged_models import gemma_path, smollm2_path

ALL, ADAPTIVE = "all twelve", "adaptive"
SETTLED, WEIGHED = "all twelve, until settled", "all twelve, weighed"
_QUANTIZATIONS = ("Q8_0", "Q4_0")
_INSTRUCTIONS = (
    "",
    "Answer each question correctly, as briefly as you can.",
    "An expert answers each question in one or two words.",
)
_RUNNERS = ("alpha", "beta", "gamma")
_SLOTS = 4
_STOP = StopConditions(max_tokens=12, strings=("\n",))
_WARM_UPS = 2
_FASTER, _WORSE = 2.0, 0.02

Line = Mapping[str, Any]


def made_models(folder: Path) -> list[Path]:
    """Both models in each quantization, made where they aren't there yet; their names tell their families."""
    found = []
    for source in (smollm2_path(), gemma_path()):
        family = family_of_file(source.name)
        for quantization in _QUANTIZATIONS:
            path = folder / family / f"{family}.{quantization}{GGUF_SUFFIX}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                say(f"making {path.name}")
                unfinished = path.with_suffix(".part")
                quantize(source, unfinished, quantization, threads=cores())
                unfinished.replace(path)
            found.append(path)
    return found


def twelve(models: Sequence[Path]) -> EnsembleSpec:
    """A vote of each file, asked in each way, that waits for all; a member's id begins with its family's name."""
    members = tuple(
        MemberSpec(stem_of(path.name), member_id=f"{path.parent.name}-{number}", instructions=instructions)
        for number, (path, instructions) in enumerate((p, i) for p in models for i in _INSTRUCTIONS)
    )
    return ensemble_spec("vote", members, quorum=len(members))


def request_of(item: Item) -> GenerationRequest:
    """A question as it is asked."""
    return GenerationRequest(
        "", TextPrompt(item.prompt), sampling=Sampling(temperature=0.0, seed=1), stop=_STOP, logprobs=0
    )


async def ask(client: MeshClient, mesh: Mesh, item: Item, spec: EnsembleSpec) -> dict[str, Any]:
    """What came of one question, and what it took: seconds, and seconds of the runners' CPU."""
    texts, files, logprobs = dict[str, str](), dict[str, str](), dict[str, list[float]]()
    told: Verdict | None = None
    cpu, began = _cpu_s(mesh), time.monotonic()
    async with client.ensemble(request_of(item), spec) as events:
        async for event in events:
            if isinstance(event, Verdict):
                told = event
            part, own = (event.member_id, event.event) if isinstance(event, MemberEvent) else ("", event)
            if isinstance(own, StartedAt):
                files[part] = own.started.artifact
            elif isinstance(own, TokenDelta):
                texts[part] = texts.get(part, "") + own.text
                logprobs.setdefault(part, []).extend(round(token.logprob, 4) for token in own.logprobs)
    seconds = time.monotonic() - began
    if told is None:
        raise BenchmarkError(f"{item.id} has no verdict")
    return {
        "text": texts.pop("", ""),
        "seconds": round(seconds, 4),
        "cpu_s": round(_cpu_s(mesh) - cpu, 3),
        "asked": told.asked,
        "members": {
            outcome.member_id: {
                "text": texts.get(outcome.member_id, ""),
                "logprobs": logprobs[outcome.member_id],
                "file": files[outcome.member_id],
            }
            for outcome in told.members
            if outcome.state is MemberState.ANSWERED
        },
    }


def _cpu_s(mesh: Mesh) -> float:
    return sum(mesh.started[name].cpu_s() for name in _RUNNERS)


@asynccontextmanager
async def asked_mesh(processes: Processes, folder: Path) -> AsyncIterator[tuple[Mesh, MeshClient]]:
    """Three runners with the models of that folder, and a client."""
    environ = {
        "CHORUS_RUNNER__MODELS_DIR": str(folder),
        "CHORUS_RUNNER__SLOTS": str(_SLOTS),
        "CHORUS_RUNNER__CONTEXT_LENGTH": "1024",
        "CHORUS_RUNNER__THREADS": "1",
    }
    mesh = Mesh(processes, Shape(_RUNNERS, runner=None, environ=environ))
    client = mesh.client(timeout_s=300.0)
    try:
        await mesh.until_all_serve()
        yield mesh, client
    finally:
        await client.aclose()


async def ask_all(items: Sequence[Item], warm_ups: Sequence[Item], place: Path, models: Path) -> None:
    """Asks what was not asked yet."""
    files = made_models(models)
    ways = {ALL: twelve(files), ADAPTIVE: ensemble_spec("auto")}
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        async with asked_mesh(processes, models) as (mesh, client):
            for item in warm_ups:
                for spec in ways.values():
                    await ask(client, mesh, item, spec)
            with place.open("a", encoding="utf-8") as file:
                for number, item in enumerate(items):
                    line: dict[str, Any] = {"id": item.id, "family": item.family, "answers": item.answers}
                    for way in (ALL, ADAPTIVE) if number % 2 else (ADAPTIVE, ALL):
                        line[way] = await ask(client, mesh, item, ways[way])
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    took = " and ".join(f"{line[way]['seconds']:.2f}" for way in (ALL, ADAPTIVE))
                    say(f"{number + 1} of {len(items)}: {took} s")


def speed(lines: Sequence[Line]) -> Bar:
    """Prints what was measured live, and judges it."""
    print(f"{len(lines)} items of {len({line['family'] for line in lines})} tasks, asked live.\n")
    print("| | right | asked | answered | seconds p50 | p95 | runners' CPU seconds | of the cores busy |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way in (ALL, ADAPTIVE):
        seconds, cpu = ([line[way][what] for line in lines] for what in ("seconds", "cpu_s"))
        asked = sum(line[way]["asked"] for line in lines) / len(lines)
        answered = sum(len(line[way]["members"]) for line in lines) / len(lines)
        busy = sum(cpu) / (sum(seconds) * cores())
        right = clopper_pearson(sum(is_right(line[way]["text"], line["answers"]) for line in lines), len(lines))
        print(
            f"| {way} | {right} | {asked:.1f} | {answered:.1f} | {percentile(seconds, 0.5):.2f} | "
            f"{percentile(seconds, 0.95):.2f} | {sum(cpu) / len(lines):.2f} | {busy:.0%} |"
        )
    faster = geometric_mean([[line[ALL]["seconds"] / line[ADAPTIVE]["seconds"] for line in lines]])
    cheaper = geometric_mean([[max(0.01, line[ALL]["cpu_s"]) / max(0.01, line[ADAPTIVE]["cpu_s"]) for line in lines]])
    print(f"\nAdaptive is {faster} times as fast, and takes the runners' CPU {cheaper} times less.")
    return Bar(f"adaptive is {_FASTER:g}x faster or better: {faster}", faster.low >= _FASTER)


class Replay:
    """What the twelve and `auto` make of recorded answers, on the files that placement gave `auto` live."""

    def __init__(self, models: Sequence[Path], items: Mapping[str, Item], live: Sequence[Line]) -> None:
        self._items = items
        self._all = twelve(models)
        self._offers = offers_of(models)
        self._plain = {(one.model, one.instructions): one.member_id for one in self._all.members}
        told = [member for line in live for member in line[ADAPTIVE]["members"].values()]
        placed = Counter(member["file"] for member in told)
        self.shares: dict[str, dict[str, float]] = {}
        for path in models:
            self.shares.setdefault(path.parent.name, {})[stem_of(path.name)] = float(placed[stem_of(path.name)])
        for own in self.shares.values():
            total = sum(own.values())
            own.update({file: count / total if total else 1.0 / len(own) for file, count in own.items()})

    def task(self, item: Item, spec: EnsembleSpec) -> Task:
        """What a coordinator would do."""
        return plan(spec, request_of(item), self._offers, Policy())

    def of_all(self, line: Line) -> dict[str, tuple[str, int]]:
        """The answer of twelve, and how many it took: all of them; until settled; weighed."""
        task = self.task(self._items[line["id"]], self._all)
        answers = {name: answer_of(name, own, name.rpartition("-")[0]) for name, own in line["members"].items()}
        ways = {ALL: task, SETTLED: replace(task, quorum=0), WEIGHED: replace(task, learned=LEARNED)}
        return {name: replayed(own, answers, Random(line["id"])) for name, own in ways.items()}

    def of_auto(self, line: Line, files: Mapping[str, str]) -> tuple[str, int]:
        """The answer of `auto` with these files, by model, and how many members it took."""
        task = self.task(self._items[line["id"]], ensemble_spec("auto"))
        answers = {}
        for member in task.members:
            told = line["members"][self._plain[files[member.model], member.instructions]]
            answers[member.member_id] = answer_of(member.member_id, told, member.model)
        return replayed(task, answers, Random(line["id"]))

    def placements(self) -> Iterator[tuple[dict[str, str], float]]:
        """A file for each model, and how often that was so."""
        for chosen in product(*self.shares.values()):
            files = dict(zip(self.shares, chosen, strict=True))
            yield files, prod(self.shares[model][file] for model, file in files.items())

    def agreement(self, line: Line, live: Line) -> tuple[list[bool], list[bool]]:
        """Which members said live what is recorded, and which of both ways gave the answer that they have by replay."""
        same = [
            normalise(told["text"]) == normalise(line["members"][name]["text"])
            for name, told in live[ALL]["members"].items()
        ]
        files = {}
        for member in self.task(self._items[line["id"]], ensemble_spec("auto")).members:
            if (told := live[ADAPTIVE]["members"].get(member.member_id)) is not None:
                recorded = line["members"][self._plain[told["file"], member.instructions]]
                same.append(normalise(told["text"]) == normalise(recorded["text"]))
                files[member.model] = told["file"]
        files = {model: files.get(model, next(iter(own))) for model, own in self.shares.items()}
        given = {ALL: self.of_all(line)[ALL], ADAPTIVE: self.of_auto(line, files)}
        return same, [normalise(text) == normalise(live[way]["text"]) for way, (text, _) in given.items()]


def worth(lines: Sequence[Line], replay: Replay, *, tasks: Collection[str]) -> Bar:
    """Prints the quality over what is recorded, and judges it: of some tasks alone it shows nothing."""
    right: dict[str, list[float]] = {ALL: [], SETTLED: [], WEIGHED: [], ADAPTIVE: []}
    needed: dict[str, list[float]] = {way: [] for way in right}
    pure: dict[str, list[float]] = {}
    for line in lines:
        for way, (text, count) in replay.of_all(line).items():
            right[way].append(is_right(text, line["answers"]))
            needed[way].append(count)
        mean = count_mean = 0.0
        for files, share in replay.placements():
            text, count = replay.of_auto(line, files)
            pure.setdefault(f"{ADAPTIVE}, {' and '.join(files.values())}", []).append(is_right(text, line["answers"]))
            mean += share * is_right(text, line["answers"])
            count_mean += share * count
        right[ADAPTIVE].append(mean)
        needed[ADAPTIVE].append(count_mean)
    families = [line["family"] for line in lines]
    print(f"\n{len(lines)} recorded items of {len(set(families))} tasks. In brackets 95% intervals.\n")
    print("| | right | answers waited for | to all twelve | to all twelve, weighed |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, scores in (right | pure).items():
        to = [
            str(paired_difference(scores, right[other], strata=families)) if way != other else ""
            for other in (ALL, WEIGHED)
        ]
        waited = f"{fmean(needed[way]):.1f}" if way in needed else ""
        print(f"| {way} | {100 * fmean(scores):.1f} | {waited} | {' | '.join(to)} |")
    print(f"\n| task | items | {ALL} | {ADAPTIVE} | difference |\n| --- | ---: | ---: | ---: | ---: |")
    for task in sorted(set(families)):
        own, theirs = (
            [score for score, name in zip(right[way], families, strict=True) if name == task] for way in (ADAPTIVE, ALL)
        )
        gain = paired_difference(own, theirs)
        print(f"| {task} | {len(own)} | {100 * fmean(theirs):.1f} | {100 * fmean(own):.1f} | {gain} |")
    gain = paired_difference(right[ADAPTIVE], right[ALL], strata=families)
    covered = f"{len(lines)} items of {len(set(families))} of {len(tasks)} tasks"
    told = f"right answers to those of all twelve, {covered}, in points, low end over -2: {gain}"
    return Bar(told, gain.low > -_WORSE and set(families) == set(tasks))


def tell_agreement(lines: Sequence[Line], live: Sequence[Line], replay: Replay) -> None:
    """Prints how many recorded answers are those that were given live."""
    recorded = {line["id"]: line for line in lines}
    both = [replay.agreement(recorded[line["id"]], line) for line in live if line["id"] in recorded]
    members, given = ([one for pair in both for one in pair[place]] for place in (0, 1))
    if both:
        print(f"\n{len(both)} of these items were asked live, too.", end=" ")
        print(f"Of {len(members)} members' answers {fmean(members):.1%} are those recorded,", end=" ")
        print(f"of {len(given)} ensembles' answers {fmean(given):.1%} are those replayed.")


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = platformdirs.user_cache_path("chorus")
    parser.add_argument("--recording", type=Path, default=cache / "adaptive.jsonl", help="what was asked live")
    parser.add_argument("--members", type=Path, default=cache / "adaptive_members.jsonl", help="each member's answers")
    parser.add_argument("--count", type=int, default=6, help="items of each task that are asked live (6)")
    parser.add_argument("--items", type=int, default=120, help="items of each task that are recorded (120)")
    parser.add_argument("--report", action="store_true", help="of what there is, without asking or recording more")
    chosen = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    families = quality_items.families(quality.vocabulary())
    tests = [[item for item in own if item.split == "test"] for own in families.values()]
    by_id = {item.id: item for own in tests for item in own}
    models = made_models(cache / "adaptive-models")
    print(f"{machine()}; runners with one thread and {_SLOTS} slots for each model.\n")
    try:
        if not chosen.report:
            chosen.recording.parent.mkdir(parents=True, exist_ok=True)
            known = {line["id"] for line in quality_record.read(chosen.recording)}
            items = [own[number] for number in range(chosen.count) for own in tests if number < len(own)]
            if todo := [item for item in items if item.id not in known]:
                warm_ups = [item for item in families["plurals"] if item.split == "tune"][:_WARM_UPS]
                asyncio.run(ask_all(todo, warm_ups, chosen.recording, cache / "adaptive-models"))
            wanted = [item for own in tests for item in own[: chosen.items]]
            spec = twelve(models)
            tasks = {item.id: plan(spec, request_of(item), (), Policy()) for item in wanted}
            record(models, tasks, wanted, chosen.members)
        live, lines = (
            [line for line in quality_record.read(place) if line["id"] in by_id]
            for place in (chosen.recording, chosen.members)
        )
        if not live or not lines:
            raise BenchmarkError("nothing was asked or recorded yet; run it without --report")
        replay = Replay(models, by_id, live)
        bars = [speed(live), worth(lines, replay, tasks=families)]
        tell_agreement(lines, live, replay)
        for model, shares in replay.shares.items():
            placed = ", ".join(f"{file} {share:.0%}" for file, share in shares.items())
            print(f"Files that placement gave `auto` for {model}: {placed}.")
        return verdict(bars)
    except BenchmarkError as error:
        print(f"adaptive: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
