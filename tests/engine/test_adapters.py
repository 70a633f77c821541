"""LoRA adapters with a real model: what they change, that they never mix, and that no file of one ends the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from chorus.core.errors import ModelFileError, NotFoundError, OverloadedError
from chorus.core.fleet.records import Feature
from chorus.core.generation import Finished, GenerationRequest, Sampling, StopConditions, TextPrompt, TokenDelta
from chorus.engine.llama import AdapterSource, LlamaEngine, LlamaSettings
from chorus.models import check_fit, inspect, read_adapter
from chorus.testing.engine_subject import hear
from tests.engine.conftest import smollm2, smollm2_path
from tests.models.tiny import write_adapter

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTINGS = LlamaSettings(slots=4, context_length=256, threads=1, adapters_kept=3)
PAIRS = [
    (f"blk.{layer}.{name}.weight", (8, 576), (rows, 8))
    for layer in range(0, 30, 3)
    for name, rows in (("attn_q", 576), ("attn_v", 192))
]
SCALES = {"nothing": 0.0, "pirate": 0.4, "poet": 0.8, "judge": 0.4}
CLOSE = 0.2  # log-probabilities nearer than this may change places with the batch that computes them


def source(folder: Path, name: str, **changes: object) -> AdapterSource:
    number = sorted(SCALES).index(name) if name in SCALES else 9
    written: dict[str, object] = {"pairs": PAIRS, "scale": SCALES.get(name, 0.4), "seed": number, **changes}
    path = write_adapter(folder / f"{name}.gguf", **written)  # type: ignore[arg-type]
    info = inspect(smollm2_path())
    return AdapterSource(
        name, path, path.stat().st_size, path.stat().st_mtime_ns, check=lambda: check_fit(read_adapter(path), info)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(folder: Path) -> AsyncIterator[LlamaEngine]:
    engine = LlamaEngine([smollm2(adapters=tuple(source(folder, name) for name in SCALES))], SETTINGS)
    await engine.start()
    await engine.load("")
    yield engine
    await engine.stop()


def ask(adapter: str = "", text: str = "Once upon a time", tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(
        "",
        TextPrompt(text),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
        logprobs=2,
        adapter=adapter,
    )


async def deltas(engine: LlamaEngine, request: GenerationRequest) -> list[TokenDelta]:
    return [event async for event in engine.generate(request) if isinstance(event, TokenDelta)]


def ids(answer: list[TokenDelta]) -> tuple[int, ...]:
    return tuple(token_id for delta in answer for token_id in delta.token_ids)


def agree(alone: list[TokenDelta], together: list[TokenDelta]) -> bool:
    """Whether both drew the same, or parted where the two likeliest tokens were next to equal."""
    if abs(alone[0].logprobs[0].logprob - together[0].logprobs[0].logprob) > CLOSE:
        return False
    for one, other in zip(alone, together, strict=True):
        if one.token_ids != other.token_ids:
            first, second = (alternative.logprob for alternative in one.logprobs[0].alternatives)
            return first - second < CLOSE
    return True


async def test_one_that_changes_nothing_changes_nothing(engine: LlamaEngine) -> None:
    plain, nothing = await deltas(engine, ask()), await deltas(engine, ask("nothing"))
    assert ids(plain) == ids(nothing)


async def test_others_change_the_answer_and_leave_nothing_behind(engine: LlamaEngine) -> None:
    plain = await deltas(engine, ask())
    answers = [await deltas(engine, ask(name)) for name in ("pirate", "poet")]
    assert len({ids(answer) for answer in (plain, *answers)}) == 3
    assert agree(plain, await deltas(engine, ask()))
    assert agree(answers[0], await deltas(engine, ask("pirate")))


async def test_streams_of_different_adapters_at_once_are_each_as_if_alone(engine: LlamaEngine) -> None:
    names = ["", "pirate", "poet", "nothing"]
    alone = [await deltas(engine, ask(name, "The sea is", 16)) for name in names]
    await engine.forget_cache()
    together = await asyncio.gather(*(deltas(engine, ask(name, "The sea is", 16)) for name in names))
    assert all(agree(one, other) for one, other in zip(alone, together, strict=True))


async def test_what_one_adapter_left_in_memory_is_not_used_with_another(engine: LlamaEngine) -> None:
    text = (
        "The old harbour lay quiet under the moon while the fishermen mended their nets and told each other stories. "
        * 2
    )
    await engine.forget_cache()
    fresh = await deltas(engine, ask("poet", text))
    await engine.forget_cache()

    async def cached(adapter: str) -> int:
        *_, last = [event async for event in engine.generate(ask(adapter, text, 1))]
        assert isinstance(last, Finished)
        return last.usage.cached_tokens

    assert await cached("pirate") == 0
    assert await cached("") == 0
    assert await cached("poet") == 0
    assert await cached("poet") > 20
    assert agree(fresh, await deltas(engine, ask("poet", text)))


async def test_it_is_said_which_there_are(engine: LlamaEngine) -> None:
    (status,) = engine.models()
    assert status.adapters == tuple(SCALES)
    assert Feature.ADAPTER in status.features
    with pytest.raises(NotFoundError, match="judge, nothing, pirate, poet") as caught:
        await hear(engine, ask("lawyer"))
    assert caught.value.metadata == {"adapter": "lawyer", "model": smollm2_path().name}


async def test_no_more_are_kept_than_may_be_and_none_that_is_in_use_goes(folder: Path) -> None:
    one = LlamaSettings(slots=2, context_length=128, threads=1, adapters_kept=1)
    engine = LlamaEngine([smollm2(adapters=tuple(source(folder, name) for name in ("pirate", "poet")))], one)
    await engine.start()
    try:
        pirate = await deltas(engine, ask("pirate", tokens=4))
        poet = await deltas(engine, ask("poet", tokens=4))  # and the other goes
        assert agree(pirate, await deltas(engine, ask("pirate", tokens=4)))  # and is read again
        running = engine.generate(ask("poet", tokens=40))
        await anext(event async for event in running if isinstance(event, TokenDelta))
        with pytest.raises(OverloadedError, match="in use"):
            await hear(engine, ask("pirate", tokens=4))
        await running.aclose()
        assert agree(poet, await deltas(engine, ask("poet", tokens=4)))
    finally:
        await engine.stop()


async def test_several_that_ask_at_once_share_one_load_and_one_that_leaves_harms_nobody(folder: Path) -> None:
    engine = LlamaEngine([smollm2(adapters=(source(folder, "judge"),))], SETTINGS)
    await engine.start()
    try:
        await engine.load("")
        tasks = [asyncio.create_task(deltas(engine, ask("judge", tokens=3))) for _ in range(3)]
        tasks[0].cancel()
        _, second, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(second, list)
        assert isinstance(third, list)
        assert agree(second, third)
    finally:
        await engine.stop()


async def test_adapters_come_and_go_while_the_model_is_loaded(folder: Path) -> None:
    bare = smollm2()
    engine = LlamaEngine([bare], SETTINGS)
    await engine.start()
    told: list[tuple[str, ...]] = []
    try:
        await engine.load("")
        engine.on_change(lambda: told.append(engine.models()[0].adapters))
        with pytest.raises(NotFoundError, match="put the adapter's GGUF"):
            await hear(engine, ask("pirate"))
        first = source(folder, "pirate")
        await engine.offer([replace(bare, adapters=(first,))])
        before = await deltas(engine, ask("pirate", tokens=6))
        # the file is replaced by another of that name
        await engine.offer([replace(bare, adapters=(source(folder, "pirate", seed=77),))])
        assert ids(before) != ids(await deltas(engine, ask("pirate", tokens=6)))
        await engine.offer([bare])
        assert told == [("pirate",), ("pirate",), ()]
    finally:
        await engine.stop()
        source(folder, "pirate")


async def test_a_file_that_is_gone_or_spoilt_since_fails_its_request_alone(folder: Path) -> None:
    spoilt, gone = source(folder, "spoilt"), source(folder, "gone")
    spoilt.path.write_bytes(spoilt.path.read_bytes()[:1000])
    gone.path.unlink()
    engine = LlamaEngine([smollm2(adapters=(spoilt, gone))], SETTINGS)
    await engine.start()
    try:
        for name in ("spoilt", "gone"):
            with pytest.raises(ModelFileError, match=name):
                await hear(engine, ask(name))
        assert await deltas(engine, ask(tokens=2))
    finally:
        await engine.stop()


_SPOILT = """
import random, sys
from pathlib import Path
import numpy as np
from chorus.core.errors import ChorusError
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context, ContextParams
from chorus.models import check_fit, inspect, read_adapter
from tests.models.tiny import write_adapter

rng = random.Random(7)
path, info, model = Path(sys.argv[2]) / "a.gguf", inspect(Path(sys.argv[1])), Model(Path(sys.argv[1]))
context = Context(model, ContextParams(64, 8, 8, 2, 2, 1, 1))
done = refused = 0

def attempt(path):
    global done, refused
    try:
        check_fit(read_adapter(path), info)
        adapter = model.load_adapter(path)
    except ChorusError:
        refused += 1
        return
    context.use_adapter(adapter)
    context.token_ids[0], context.positions[0], context.wants_output[0] = 5, context.last_position(0) + 1, 1
    done += context.decode(1) == 0
    context.use_adapter(None)
    context.remove(0)
    adapter.close()

q = "blk.0.attn_q.weight"
shapes = [(4, 576), (576, 4), (4, 4), (576, 576), (1, 576), (576, 1), (2, 4, 576), (2, 576, 4), (4, 1), (49152, 4)]
names = [q, "blk.0.ffn_down.weight", "token_embd.weight", "blk.0.attn_norm.weight", "output.weight", "no.weight"]
for _ in range(60):
    pairs = [(rng.choice(names), rng.choice(shapes), rng.choice(shapes))]
    attempt(write_adapter(path, pairs=pairs, dtype=rng.choice([np.float32, np.float16, np.int32, np.int8])))
bad = [{"alpha": "x"}, {"kind": "model"}, {"method": "x"}, {"architecture": "gemma3"}, {"alpha": float("inf")}]
for changes in bad:
    attempt(write_adapter(path, pairs=[(q, (4, 576), (576, 4))], **changes))
whole = write_adapter(path, pairs=[(q, (4, 576), (576, 4))]).read_bytes()
attempt(path)
assert done, "a sound one must be used"
for _ in range(150):
    content = bytearray(whole)
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(400)] = rng.randrange(256)
    path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
    attempt(path)
context.close()
model.close()
try:
    model.load_adapter(path)
except ChorusError:
    refused += 1
print("survived", done, refused)
"""


async def test_no_adapter_aborts_the_process(tmp_path: Path) -> None:
    result = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
        [sys.executable, "-c", _SPOILT, str(smollm2_path()), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    done, refused = (int(word) for word in result.stdout.split()[-2:])
    assert done > 5
    assert refused > 50
