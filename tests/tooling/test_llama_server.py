"""What decides which llama-server is built and reused: one linked to other libraries would be compared unfairly."""

import io
import tarfile
from pathlib import Path

import pytest

import llama_server
from console import SetupError
from llama_wheel import Pin, key


def _libraries(folder: Path, **contents: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for name, content in contents.items():
        path = folder / f"lib{name}.so.0"
        path.write_bytes(content)
        paths.append(path)
    return paths


def test_a_server_is_named_by_the_very_libraries_that_it_is_linked_to(tmp_path):
    running = {"version": "1", "cpu": "a CPU"}
    one = key(llama_server.inputs_of(running, _libraries(tmp_path / "a", llama=b"x", ggml=b"y")))
    assert one == key(llama_server.inputs_of(running, _libraries(tmp_path / "b", llama=b"x", ggml=b"y")))
    assert one != key(llama_server.inputs_of(running, _libraries(tmp_path / "c", llama=b"x", ggml=b"z")))
    assert one != key(llama_server.inputs_of({**running, "cpu": "another"}, _libraries(tmp_path / "a", llama=b"x")))


def test_the_installed_wheel_must_be_the_pinned_one():
    with pytest.raises(SetupError, match=r"0\.0\.1 is pinned"):
        llama_server.libraries(Pin("0.0.1", ""))


def _archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            package.addfile(member, io.BytesIO(b"x"))
    return path


def test_only_llama_cpps_own_sources_are_unpacked(tmp_path):
    sources = "llama_cpp_python-1/vendor/llama.cpp"
    archive = _archive(
        tmp_path / "a.tar.gz", f"{sources}/CMakeLists.txt", f"{sources}/src/a.cpp", "llama_cpp_python-1/b.py"
    )
    found = llama_server._unpack(archive, tmp_path / "out")
    assert found == tmp_path / "out" / sources
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == ["CMakeLists.txt", "a.cpp"]


def test_a_package_without_sources_is_told(tmp_path):
    with pytest.raises(SetupError, match=r"a\.tar\.gz carries no llama\.cpp"):
        llama_server._unpack(_archive(tmp_path / "a.tar.gz", "llama_cpp_python-1/b.py"), tmp_path / "out")


def test_a_folder_without_the_program_is_no_kept_server(tmp_path):
    assert llama_server.kept(tmp_path) is None
    (tmp_path / "llama-server").touch()
    assert llama_server.kept(tmp_path) == tmp_path / "llama-server"
