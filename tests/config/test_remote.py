"""`runner.remote`: a model server in one line, and what is wrong with it where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from chorus.config import load_config, option_specs, to_env, to_toml
from chorus.config.remote import RemoteKind, RemoteServer
from chorus.core.errors import ConfigError

OLLAMA = RemoteServer(RemoteKind.OLLAMA, "http://127.0.0.1:11434")


def loaded(value: object, **more: object) -> RemoteServer | None:
    flags = {"runner.remote": value, **{f"runner.{name}": given for name, given in more.items()}}
    return load_config(flags=flags, environ={"CHORUS_CONFIG": ""}).runner.remote


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("ollama", OLLAMA),
        ("Ollama = http://127.0.0.1:11434/", OLLAMA),
        ("openai=http://gpu.lan:8000/v1/", RemoteServer(RemoteKind.OPENAI, "http://gpu.lan:8000")),
        ("openai=https://api.example.com/openai/v1", RemoteServer(RemoteKind.OPENAI, "https://api.example.com/openai")),
        ("openai=http://[::1]:8000", RemoteServer(RemoteKind.OPENAI, "http://[::1]:8000")),
    ],
)
def test_one_line_names_a_server(text: str, server: RemoteServer) -> None:
    assert loaded(text) == server
    assert RemoteServer.parse(str(server)) == server


def test_a_list_of_one_is_one(tmp_path: Path) -> None:
    file = tmp_path / "chorus.toml"
    file.write_text('[runner]\nremote = ["ollama"]\nremote_api_key_file = "key"\n')
    runner = load_config(file=file, environ={}).runner
    assert (runner.remote, runner.remote_api_key_file) == (OLLAMA, tmp_path / "key")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http://127.0.0.1:11434", "should be KIND=URL"),
        ("vllm=http://127.0.0.1:8000", "should be KIND=URL"),
        ("openai", "should be KIND=URL"),
        ("openai=gpu:8000", "should begin with http://HOST"),
        ("openai=ftp://gpu", "should begin with http://HOST"),
        ("openai=http://gpu:99999", "the URL's address"),
        ("openai=http://me:secret@gpu", "no user name or password"),
        ("openai=http://gpu?key=1", "no '?'"),
        ("ollama,openai=http://gpu:8000", "a runner has one engine; start another runner"),
        ("openai=http://gpu:8000/ü", "should be KIND=URL"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(text)
    assert "runner.remote" in caught.value.message
    assert problem in caught.value.message
    assert "secret" not in caught.value.message


def test_two_servers_in_a_file_are_two_runners(tmp_path: Path) -> None:
    file = tmp_path / "chorus.toml"
    file.write_text('[runner]\nremote = ["ollama", "openai=http://gpu:8000"]\n')
    with pytest.raises(ConfigError, match="start another runner"):
        load_config(file=file, environ={})


def test_a_key_is_not_sent_over_the_internet_in_the_clear(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unencrypted"):
        loaded("openai=http://api.example.com", remote_api_key_file=tmp_path / "key")
    assert loaded("openai=http://gpu.lan:8000", remote_api_key_file=tmp_path / "key")


def test_it_is_written_back_and_has_a_flag(tmp_path: Path) -> None:
    config = load_config(flags={"runner.remote": "ollama"}, environ={})
    file = tmp_path / "written.toml"
    file.write_text(to_toml(config))
    assert load_config(file=file, environ={}) == config
    file.write_text("")
    assert load_config(file=file, environ=to_env(config)) == config
    (option,) = (option for option in option_specs("runner") if option.key == "runner.remote")
    assert (option.flag, option.metavar, option.multiple) == ("--remote", "KIND=URL", False)
