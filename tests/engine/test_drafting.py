"""The draft model: what it guesses, what it keeps in memory of whom, and which models it cannot draft for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from chorus.core.batching.speculation import Source, Speculation
from chorus.core.errors import ChorusError, ConfigError, ModelFileError
from chorus.core.fleet.records import ModelState
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt
from chorus.engine.llama import LlamaEngine, LlamaSettings
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context, ContextParams
from chorus.engine.llama.drafting import Drafter, DraftRequest, check_vocabularies
from chorus.testing.engine_subject import hear
from tests.engine.conftest import smollm2, smollm2_path

PARAMS = ContextParams(
    cells=256, batch_tokens=64, micro_batch_tokens=64, sequences=2, outputs=8, threads=1, threads_batch=1
)
TEXTS = ("Count: one, two, three, four,", "The capital of France is", "Once upon a time")
CLOSE = 0.2


@pytest.fixture(scope="module")
def target() -> Iterator[Model]:
    model = Model(smollm2_path())
    yield model
    model.close()


@pytest.fixture
def drafter(target: Model) -> Iterator[Drafter]:
    made = Drafter(target, Model(smollm2_path()), PARAMS, sure=0.0)
    yield made
    made.close()


def ids(model: Model, text: str) -> list[int]:
    return model.tokenize(text, add_special=False, parse_special=True)


def greedy(model: Model, tokens: list[int], count: int) -> tuple[list[int], float]:
    """The greedy continuation, and the least gap between the two largest logits on the way."""
    context = Context(model, replace(PARAMS, sequences=1))
    found: list[int] = []
    gap, done = float("inf"), 0
    try:
        for _ in range(count):
            new = [*tokens, *found][done:]
            context.token_ids[: len(new)] = new
            context.positions[: len(new)] = range(done, done + len(new))
            context.sequence_ids[: len(new)] = 0
            context.wants_output[: len(new)] = 0
            context.wants_output[len(new) - 1] = 1
            assert context.decode(len(new)) == 0
            done += len(new)
            row = context.logits(1)[0]
            second, first = np.partition(row, -2)[-2:]
            gap = min(gap, float(first - second))
            found.append(int(row.argmax()))
    finally:
        context.close()
    return found, gap


def same(guess: list[int], expected: tuple[list[int], float]) -> bool:
    return guess == expected[0] or expected[1] < CLOSE


def test_what_it_guesses_is_its_greedy_continuation_for_several_streams_at_once(
    target: Model, drafter: Drafter
) -> None:
    prompts = [ids(target, text) for text in TEXTS[:2]]
    guesses = drafter.propose([DraftRequest(7, prompts[0], 6), DraftRequest(3, prompts[1], 4)])
    assert [len(guess) for guess in guesses] == [6, 4]
    assert same(guesses[0], greedy(target, prompts[0], 6))
    assert same(guesses[1], greedy(target, prompts[1], 4))
    assert drafter.step_s > 0


def test_it_keeps_what_came_true_and_takes_back_the_rest(target: Model, drafter: Drafter) -> None:
    prompt = ids(target, TEXTS[0])
    (first,) = drafter.propose([DraftRequest(0, prompt, 6)])
    assert drafter.held(0) == len(prompt) + 5  # the last one guessed was not computed
    other = (first[2] + 1) % target.vocabulary_size
    tokens = [*prompt, *first[:2], other]  # two came true, and then another token was drawn
    (second,) = drafter.propose([DraftRequest(0, tokens, 3)])
    assert same(second, greedy(target, tokens, 3))
    assert drafter.held(0) == len(tokens) + 2


def test_nothing_is_guessed_that_it_is_not_sure_of(target: Model) -> None:
    drafter = Drafter(target, Model(smollm2_path()), PARAMS, sure=1.01)
    try:
        assert drafter.propose([DraftRequest(0, ids(target, TEXTS[2]), 4)]) == [[]]
    finally:
        drafter.close()


def test_a_long_prompt_is_read_a_piece_at_a_time(target: Model) -> None:
    drafter = Drafter(target, Model(smollm2_path()), PARAMS, catch_up_tokens=20, sure=0.0)
    try:
        long, short = ids(target, "word " * 50), ids(target, TEXTS[1])
        assert drafter.propose([DraftRequest(0, long, 3)]) == [[]]
        held = [drafter.held(0)]
        assert held == [20]
        while not (guesses := drafter.propose([DraftRequest(0, long, 3), DraftRequest(1, short, 3)]))[0]:
            held.append(drafter.held(0))
            assert held[-1] == held[-2] + 20
        assert same(guesses[0], greedy(target, long, 3))
        assert same(drafter.propose([DraftRequest(1, short, 3)])[0], greedy(target, short, 3))
    finally:
        drafter.close()


def test_a_slot_that_has_another_stream_now_is_read_anew(target: Model, drafter: Drafter) -> None:
    for text in TEXTS:
        prompt = ids(target, text)
        (guess,) = drafter.propose([DraftRequest(0, prompt, 3)])
        assert same(guess, greedy(target, prompt, 3))


def test_where_there_are_more_streams_than_places_the_one_longest_ago_is_forgotten(
    target: Model, drafter: Drafter
) -> None:
    prompts = [ids(target, text) for text in TEXTS]
    for slot, prompt in enumerate(prompts):  # two places
        drafter.propose([DraftRequest(slot, prompt, 2)])
    assert (drafter.held(0), drafter.held(1) > 0, drafter.held(2) > 0) == (0, True, True)
    drafter.forget(1)
    drafter.forget(1)
    assert drafter.held(1) == 0
    assert drafter.propose([DraftRequest(slot, prompts[slot], 2) for slot in range(3)])[1] == []
    (guess,) = drafter.propose([DraftRequest(0, prompts[0], 2)])
    assert same(guess, greedy(target, prompts[0], 2))


def test_a_full_memory_forgets_others_and_then_guesses_less_or_nothing(target: Model, drafter: Drafter) -> None:
    word = ids(target, " word")[0]
    drafter.propose([DraftRequest(0, [word] * 150, 2)])
    drafter.propose([DraftRequest(1, [word] * 150, 2)])
    assert drafter.held(0) == 0
    assert drafter.held(1) > 0
    for _ in range(4):
        found = drafter.propose([DraftRequest(1, [word] * 253, 8)])[0]
    assert len(found) == 3
    assert drafter.propose([DraftRequest(1, [word] * 256, 8)]) == [[]]
    assert drafter.propose([DraftRequest(1, [word] * 400, 8)]) == [[]]
    two = [DraftRequest(slot, [word] * 140, 4) for slot in range(2)]
    for _ in range(3):
        guesses = drafter.propose(two)
    assert any(guesses)
    assert not all(guesses), "both together do not fit"


def test_tokens_that_it_does_not_know_are_not_guessed_upon(target: Model, drafter: Drafter) -> None:
    assert drafter.propose([DraftRequest(0, [5, 10**6], 2), DraftRequest(1, [], 2), DraftRequest(2, [5], 0)]) == [
        [],
        [],
        [],
    ]


# --- which models can --------------------------------------------------------------------------------------------


def written(path: Path, *, model: str = "gpt2", tokens: int = 49_152, eos: int = 2, odd: int = -1) -> Path:
    """The smallest model with a vocabulary of so many made-up tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("smollm")
    words = [f"t{number}" for number in range(tokens)]
    if odd >= 0:
        words[odd] = "odd"
    writer.add_token_list(words)
    writer.add_token_types([1] * tokens)
    writer.add_token_scores([0.0] * tokens)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    square = np.full((32, 32), 0.01, dtype=np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((tokens, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"odd": 700}, "token 700 is 't700' in one and 'odd' in the other"),
        ({"eos": 9}, "end with different tokens"),
        ({"tokens": 1200}, "1000 and 1200 tokens"),
        ({"model": "llama"}, "of different types"),
        ({"odd": 3, "tokens": 1100}, ""),
        ({}, ""),
    ],
)
def test_only_a_model_with_the_same_vocabulary_can_draft(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    first = Model(written(tmp_path / "a.gguf", tokens=1000), vocabulary_only=True)
    second = Model(written(tmp_path / "b.gguf", **{"tokens": 1000, **changes}), vocabulary_only=True)  # type: ignore[arg-type]
    try:
        if not words:
            check_vocabularies(first, second, target_name="large", draft_name="small")
            return
        with pytest.raises(ConfigError, match=words) as caught:
            check_vocabularies(first, second, target_name="large", draft_name="small")
        assert "small cannot draft for large" in str(caught.value)
        assert "runner.draft_models" in str(caught.value)
    finally:
        first.close()
        second.close()


# --- in the engine -----------------------------------------------------------------------------------------------

SETTINGS = LlamaSettings(slots=2, context_length=256, threads=1)


def describe(tokens: int = 40) -> GenerationRequest:
    return GenerationRequest(
        "",
        TextPrompt("My favourite place in the whole world is"),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )


@pytest.mark.asyncio(loop_scope="session")
async def test_guesses_are_checked_and_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[tuple[int, int]] = []
    learn = Speculation.learn

    def count(_: Speculation, source: Source, **__: object) -> int:
        return 4 if source is Source.DRAFT_MODEL else 0  # whether it pays or not

    def watched(self: Speculation, source: Source, guessed: int, kept: int) -> None:
        learnt.append((guessed, kept))
        learn(self, source, guessed, kept)

    monkeypatch.setattr(Speculation, "count", count)
    monkeypatch.setattr(Speculation, "learn", watched)
    answers = []
    for source in (smollm2(), smollm2(draft=smollm2())):
        engine = LlamaEngine([source], SETTINGS)
        await engine.start()
        try:
            answers.append((await hear(engine, describe())).ids())
            if source.draft is not None:
                await asyncio.gather(*(hear(engine, describe(20)) for _ in range(4)))
        finally:
            await engine.stop()
    assert len(learnt) > 10
    assert sum(kept for _, kept in learnt) > 0.8 * sum(guessed for guessed, _ in learnt)
    assert answers[0][:10] == answers[1][:10]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("odd.gguf", ConfigError, "cannot draft for"), ("gone.gguf", ModelFileError, "the draft model of")],
)
async def test_a_draft_model_that_cannot_draft_is_told_when_its_model_is_loaded(
    tmp_path: Path, name: str, error: type[ChorusError], words: str
) -> None:
    written(tmp_path / "odd.gguf", eos=9)
    engine = LlamaEngine([smollm2(draft=smollm2(tmp_path / name))], SETTINGS)
    await engine.start()
    try:
        with pytest.raises(error, match=words):
            await engine.load("")
        (status,) = engine.models()
        assert status.state is ModelState.FAILED
        assert words in status.error
    finally:
        await engine.stop()
