"""Twelve members always, or as many as the question needs: time, quality, and what the machines are busy with.

    make bench ONLY=adaptive        half an hour or more; may be broken off, and goes on where it was

A registry, a coordinator and three runners, each a process of its own, over mutual TLS. Each runner has two models,
SmolLM2-135M-Instruct and Gemma 3 270M, each in two quantizations made here; each of the four files is asked in three
ways, which makes twelve members. "All twelve" is a vote of them all. "Adaptive" is `auto` and names nobody: the
complexity of the question says how many may think, and of models whose answers are weighed each is asked once. Items
are those of the test half of `quality_items.py`, tasks in turns; each is answered both ways, one after the other, the
first one in turns, too.

So few items as that takes can't tell small differences in quality. So the whole test half of `quality.py`'s recording
is told beside it: twelve answers, six of each model, against the two of `auto`; of one quantization of each model and
asked in one way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import platformdirs
import quality
import quality_items
import quality_record
import structlog
from figures import Bar, geometric_mean, percentile, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, Processes, machine, processes_in, say
from servers import cores

from chorus.client import MemberEvent, MeshClient, Verdict, ensemble_spec
from chorus.core.ensemble.answers import same_answer
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.records import Answer, EnsembleSpec, MemberSpec
from chorus.core.ensemble.weighing import best_weighed
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt, TokenDelta
from chorus.engine.llama.binding import quantize
from chorus.eval.dataset import Item
from chorus.eval.scoring import is_right
from chorus.eval.statistics import clopper_pearson, paired_difference
from chorus.models.naming import GGUF_SUFFIX, family_of_file, stem_of
from chorus.testing.packaged_models import gemma_path, smollm2_path

ALL, ADAPTIVE = "all twelve", "adaptive"
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
    """A vote of each file, asked in each way; a member's id begins with its family's name."""
    members = tuple(
        MemberSpec(stem_of(path.name), member_id=f"{path.parent.name}-{number}", instructions=instructions)
        for number, (path, instructions) in enumerate((p, i) for p in models for i in _INSTRUCTIONS)
    )
    return ensemble_spec("vote", members)


async def ask(client: MeshClient, mesh: Mesh, item: Item, spec: EnsembleSpec) -> dict[str, Any]:
    """What came of one question, and what it took: seconds, and seconds of the runners' CPU."""
    request = GenerationRequest(
        "", TextPrompt(item.prompt), sampling=Sampling(temperature=0.0, seed=1), stop=_STOP, logprobs=0
    )
    texts, logprobs = dict[str, str](), dict[str, list[float]]()
    told: Verdict | None = None
    cpu, began = _cpu_s(mesh), time.monotonic()
    async with client.ensemble(request, spec) as events:
        async for event in events:
            if isinstance(event, Verdict):
                told = event
            part, own = (event.member_id, event.event) if isinstance(event, MemberEvent) else ("", event)
            if isinstance(own, TokenDelta):
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
        "members": {member: {"text": text, "logprobs": logprobs[member]} for member, text in texts.items()},
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


async def record(items: Sequence[Item], warm_ups: Sequence[Item], place: Path, models: Path) -> None:
    """Asks what is not recorded yet."""
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


def report(lines: Sequence[Line], prompts: Mapping[str, str]) -> list[Bar]:
    """Prints what was measured, and judges it."""
    right = {
        ALL: [is_right(line[ALL]["text"], line["answers"]) for line in lines],
        f"{ALL}, weighed": [is_right(_weighed(line, prompts[line["id"]]), line["answers"]) for line in lines],
        ADAPTIVE: [is_right(line[ADAPTIVE]["text"], line["answers"]) for line in lines],
    }
    print(f"{len(lines)} items of {len({line['family'] for line in lines})} tasks.\n")
    print("| | right | asked | seconds p50 | p95 | runners' CPU seconds | of the cores busy |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way in (ALL, ADAPTIVE):
        seconds, cpu = ([line[way][what] for line in lines] for what in ("seconds", "cpu_s"))
        asked = sum(line[way]["asked"] for line in lines) / len(lines)
        busy = sum(cpu) / (sum(seconds) * cores())
        share = clopper_pearson(sum(right[way]), len(lines))
        print(
            f"| {way} | {share} | {asked:.1f} | {percentile(seconds, 0.5):.2f} | {percentile(seconds, 0.95):.2f} | "
            f"{sum(cpu) / len(lines):.2f} | {busy:.0%} |"
        )
    print(f"\nAll twelve, weighed as `auto` weighs: {100 * sum(right[f'{ALL}, weighed']) / len(lines):.1f}% right.")
    faster = geometric_mean([[line[ALL]["seconds"] / line[ADAPTIVE]["seconds"] for line in lines]])
    cheaper = geometric_mean([[max(0.01, line[ALL]["cpu_s"]) / max(0.01, line[ADAPTIVE]["cpu_s"]) for line in lines]])
    print(f"Adaptive is {faster} times as fast, and takes the runners' CPU {cheaper} times less.")
    bars = [Bar(f"adaptive is {_FASTER:g}x faster or better: {faster}", faster.low >= _FASTER)]
    for way in (ALL, f"{ALL}, weighed"):
        gain = paired_difference(right[ADAPTIVE], right[way])  # few items of each task: no strata
        bars.append(Bar(f"its right answers to those of {way}, in points, low end over -2: {gain}", gain.low > -_WORSE))
    return bars


def replayed(lines: Sequence[Line], items: Mapping[str, Item]) -> list[Bar]:
    """The quality of `auto` to that of twelve recorded answers, plainly and weighed."""
    families = [line["family"] for line in lines]
    ours = [is_right(quality.auto(LEARNED, items, line).text, line["answers"]) for line in lines]
    bars = []
    for way in ("a vote", "weighed"):
        theirs = []
        for line in lines:
            answers = quality.answers_of(line, {quality.SMALL: 6, quality.LARGE: 6})
            weighed = way == "weighed"
            best = best_weighed(answers, items[line["id"]].prompt, same_answer, LEARNED) if weighed else None
            theirs.append(is_right((best or quality.agreed(answers)).text, line["answers"]))
        gain = paired_difference(ours, theirs, strata=families)
        told = f"right answers of two to those of twelve as {way}, {len(lines)} recorded items, low end over -2: {gain}"
        bars.append(Bar(told, gain.low > -_WORSE))
    return bars


def _weighed(line: Line, prompt: str) -> str:
    """What the twelve would have said had they been weighed."""
    answers = []
    for member, told in line[ALL]["members"].items():
        family = member.rpartition("-")[0]
        answers.append(Answer(member, told["text"], logprobs=tuple(told["logprobs"]) or None, model=family))
    best = best_weighed(answers, prompt, same_answer, LEARNED)
    return best.text if best is not None else ""


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = platformdirs.user_cache_path("chorus")
    parser.add_argument("--recording", type=Path, default=cache / "adaptive.jsonl")
    parser.add_argument("--quality", type=Path, default=cache / "quality.jsonl", help="what quality.py has recorded")
    parser.add_argument("--count", type=int, default=30, help="items of each task (30)")
    parser.add_argument("--report", action="store_true", help="of what is recorded, without asking for more")
    chosen = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    families = quality_items.families(quality.vocabulary())
    tests = [[item for item in own if item.split == "test"] for own in families.values()]
    items = [own[number] for number in range(chosen.count) for own in tests if number < len(own)]
    known = {line["id"] for line in quality_record.read(chosen.recording)}
    print(f"{machine()}; runners with one thread and {_SLOTS} slots for each model.\n")
    try:
        if not chosen.report:
            warm_ups = [item for item in families["plurals"] if item.split == "tune"][:_WARM_UPS]
            chosen.recording.parent.mkdir(parents=True, exist_ok=True)
            todo = [item for item in items if item.id not in known]
            asyncio.run(record(todo, warm_ups, chosen.recording, cache / "adaptive-models"))
        prompts = {item.id: item.prompt for own in tests for item in own}
        lines = [line for line in quality_record.read(chosen.recording) if line["id"] in prompts]
        if not lines:
            raise BenchmarkError("nothing is recorded yet")
        recorded = [line for line in quality_record.read(chosen.quality) if line["id"] in prompts]
        by_id = {item.id: item for own in tests for item in own}
        return verdict(report(lines, prompts) + (replayed(recorded, by_id) if recorded else []))
    except BenchmarkError as error:
        print(f"adaptive: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
