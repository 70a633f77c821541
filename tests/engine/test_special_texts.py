"""Long texts are tokenized in pieces, and the tokens are those of the whole: with the vocabularies of SmolLM2 and
Gemma, and with one whose special tokens run into each other, with and without white space that they swallow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.engine.llama import special_texts, tokenizer
from chorus.engine.llama.binding import Model
from chorus.engine.llama.special_texts import SpecialTexts
from tests.engine.conftest import smollm2_path

CONTROL, USER_DEFINED, NORMAL, BYTE = 3, 4, 1, 6
ODD = [
    ("<s>", CONTROL), ("</s>", CONTROL), ("<unk>", 2), ("ab", USER_DEFINED), ("bcd", USER_DEFINED), ("aba", CONTROL),
    ("|||", USER_DEFINED), ("|||X|||", CONTROL), ("X|", USER_DEFINED), (" y ", USER_DEFINED), ("\n\n\n", USER_DEFINED),
    ("\n", CONTROL), ("zz", USER_DEFINED), ("zzzz", CONTROL), ("<q>", USER_DEFINED), ("é>", USER_DEFINED),
    ("<|endoftext|>", CONTROL),
]  # fmt: skip
PIECES = {
    "smollm2": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|im_", "start|>", "<", "|>",
                "<reponame>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<unused7>", "<table>", "</table>", "<h1>", "<tab",
              "[multimodal]", "<unk>", ">", "\n" * 31, "\n" * 40, "\n" * 70, " " * 31, " " * 40, "\t\t", "<0x0A>",
              "▁▁"],
    "odd": [text for text, _ in ODD],
    "phi-3": [text for text, _ in ODD],
}  # fmt: skip
PLAIN = ["", "a", "b", "cd", " ", "  ", "\n", "\n\n", "é", "🙂", "다", "word", " word", "\t", "x" * 40, "z", "|", "X"]


def written(path: Path, name: str) -> Path:
    """A vocabulary alone: `ODD`, single letters and bytes, as SentencePiece has them. Where it is a phi-3, llama.cpp
    lets most special tokens swallow the white space on their right."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    tokens = [*ODD, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), *((one, NORMAL) for one in "▁abcdxyz|X")]
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores([-float(place) for place in range(len(tokens))])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(name == "odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory, gemma_path: Path) -> Iterator[Callable[[str], Model]]:
    folder = tmp_path_factory.mktemp("vocabularies")
    models: dict[str, Model] = {}

    def vocabulary(name: str) -> Model:
        if name not in models:
            path = {"smollm2": smollm2_path(), "gemma": gemma_path}.get(name) or written(folder / f"{name}.gguf", name)
            models[name] = Model(path, vocabulary_only=True)
        return models[name]

    yield vocabulary
    for model in models.values():
        model.close()


@pytest.fixture
def cut_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_SHORT_TEXT", 0)
    monkeypatch.setattr(special_texts, "_BETWEEN_CUTS", 1)
    monkeypatch.setattr(special_texts, "_SLAB", 7)


@pytest.mark.usefixtures("cut_often")
@pytest.mark.parametrize("name", ["smollm2", "gemma", "odd", "phi-3"])
def test_the_tokens_of_the_pieces_are_those_of_the_whole(vocabularies: Callable[[str], Model], name: str) -> None:
    model = vocabularies(name)
    parts = st.one_of(st.sampled_from(PIECES[name]), st.sampled_from(PLAIN), st.text(max_size=3))
    repeated = st.builds(lambda part, count: part * count, parts, st.integers(1, 5))
    cut = 0

    @given(st.lists(repeated, max_size=20).map("".join), st.booleans(), st.booleans())
    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(text: str, add_special: bool, parse_special: bool) -> None:
        nonlocal cut
        cut += bool(model.tokenizer.special_texts(parse_special).cuts(text.encode()))
        pieces = model.tokenize(text, add_special=add_special, parse_special=parse_special)
        assert pieces == model.tokenizer.of_piece(text.encode(), add_special=add_special, parse_special=parse_special)

    check()
    assert cut > 50


@pytest.mark.parametrize(
    ("name", "text", "parse_special"),
    [
        ("smollm2", "<|im_start|>", True),
        ("smollm2", "<|im_start|>user\nHello<|im_end|>\n", True),
        ("gemma", "<start_of_turn>", True),
        ("gemma", "a\n", False),
        ("gemma", "\n", False),
        ("gemma", "<table>  <h1>", False),
    ],
)
def test_no_piece_has_many_special_tokens(
    vocabularies: Callable[[str], Model], name: str, text: str, parse_special: bool
) -> None:
    """What a piece takes grows with the square of their number; 20,000 at once took a second, and 200,000 minutes."""
    model = vocabularies(name)
    specials = model.tokenizer.special_texts(parse_special)
    data = (text * (400_000 // len(text))).encode()
    most = 0
    for start, end in itertools.pairwise((0, *specials.cuts(data), len(data))):
        most = max(most, len(model.tokenizer.of_piece(data[start:end], add_special=False, parse_special=parse_special)))
    assert most <= 16 * special_texts._BETWEEN_CUTS


def test_little_is_cut_where_little_is_special() -> None:
    specials = SpecialTexts([b"<a>", b"</a>"])
    assert specials.cuts(b"plain text" * 100_000 + b"<a>" * 100) == []
    cuts = specials.cuts(b"x" * 3_000_000 + b"<a>" * 300 + b"y" * 3_000_000)
    assert cuts == [3_000_000 + 3 * 128, 3_000_000 + 3 * 256]
    assert specials.cuts(b"") == []
