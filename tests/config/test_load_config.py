"""Loading: which source wins, what is refused, and that a refusal names the key and where it was set."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from chorus.config import Endpoint, ListenAddress, RunnerSettings, load_config, load_with_origins
from chorus.config.document import Key
from chorus.config.load import _line
from chorus.config.sections import Section
from chorus.config.sources import Setting
from chorus.core.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chorus.toml in the working directory or the user's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda _app: tmp_path / "user")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(**sources: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(**({"environ": {}} | sources))  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def test_defaults_alone_are_a_valid_configuration() -> None:
    config = load_config(environ={})
    assert config.registry.listen == ListenAddress("127.0.0.1", 7101)
    assert config.runner.registries == (Endpoint("127.0.0.1", 7101, "registry"),)
    assert config.runner.models is None
    assert config.mesh.certs_dir.is_absolute()


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[registry]\nlease_ttl_s = 10\nwatch_flush_interval_s = 1\nname = 'from-file'\n")
    environ = {"CHORUS_REGISTRY__LEASE_TTL_S": "20", "CHORUS_REGISTRY__WATCH_FLUSH_INTERVAL_S": "2"}
    loaded = load_with_origins(flags={"registry.lease_ttl_s": 30, "runner.slots": None}, file=file, environ=environ)
    registry = loaded.config.registry
    assert (registry.lease_ttl_s, registry.watch_flush_interval_s, registry.name) == (30, 2, "from-file")
    assert registry.heartbeat_interval_s == 0.5
    assert loaded.origins == {
        "registry.lease_ttl_s": "flag --lease-ttl-s",
        "registry.watch_flush_interval_s": "environment variable CHORUS_REGISTRY__WATCH_FLUSH_INTERVAL_S",
        "registry.name": f"{file}:4",
    }
    assert loaded.file == file


def test_the_file_is_found_in_its_usual_places_in_order(tmp_path: Path) -> None:
    def name(file: Path | None = None, environ: dict[str, str] | None = None) -> str:
        return load_config(file=file, environ=environ or {}).registry.name

    write(tmp_path / "user" / "chorus.toml", "registry.name = 'user'")
    assert name() == "user"
    write(tmp_path / "chorus.toml", "registry.name = 'here'")
    assert name() == "here"
    named = {"CHORUS_CONFIG": str(write(tmp_path / "env.toml", "registry.name = 'env'"))}
    assert name(environ=named) == "env"
    assert name(file=write(tmp_path / "flag.toml", "registry.name = 'flag'"), environ=named) == "flag"


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    assert problems(file=tmp_path / "none.toml") == [
        f"{tmp_path / 'none.toml'}: there is no such configuration file (--config)"
    ]
    (line,) = problems(environ={"CHORUS_CONFIG": "none.toml"})
    assert "environment variable CHORUS_CONFIG" in line
    assert problems(file=Path("~nobody-of-this-name/x")) == [
        "~nobody-of-this-name/x: names the home folder of a user who has none (--config)"
    ]


def test_all_problems_are_told_at_once_each_with_key_and_source(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[log]\nlevel = 'loud'\n\n[runner]\nslot = 3\nthreads = true\n")
    lines = problems(
        file=file,
        environ={"CHORUS_REGISTRY__LISTN": "h:1", "CHORUS_RUNNER__REGISTRIES": "a@h:1,nowhere"},
        flags={"runner.max_queue": -1},
    )
    assert lines == [
        f"runner.slot: there is no such key, did you mean slots? ({file}:5)",
        "CHORUS_REGISTRY__LISTN: there is no such key, did you mean CHORUS_REGISTRY__LISTEN? "
        "(environment variable CHORUS_REGISTRY__LISTN)",
        f"log.level = 'loud': should be 'debug', 'info', 'warning' or 'error' ({file}:2)",
        "runner.registries[1] = 'nowhere': should be HOST:PORT (environment variable CHORUS_RUNNER__REGISTRIES)",
        f"runner.threads = True: should not be true or false ({file}:6)",
        "runner.max_queue = -1: should be greater than or equal to 0 (flag --max-queue)",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[regsitry]\n", "regsitry: there is no such section, did you mean registry? (c.toml:1)"),
        ("log = 3\n", "log: should be a table, [log] (c.toml:1)"),
        ("[registry]\nslots = 3\n", "registry.slots: there is no such key, did you mean runner.slots? (c.toml:2)"),
        ("[registry]\nzzz = 'hunter2'\n", "registry.zzz: there is no such key (c.toml:2)"),
        ("[registry\n", "c.toml: is not valid TOML: "),
        ("a = " + "[" * 5000, "c.toml: is not valid TOML: "),
        ("a = '" + "x" * (1 << 20) + "'", "c.toml: is larger than 1048576 bytes, so it is no configuration file"),
        ("[runner.labels]\nfloor = 3\n", "runner.labels['floor'] = 3: should be a valid string (c.toml:1)"),
        ("[registry]\nlisten = 7101\n", "registry.listen = 7101: should be text such as '127.0.0.1:7101' (c.toml:2)"),
    ],
)
def test_what_a_file_gets_wrong(tmp_path: Path, text: str, problem: str) -> None:
    file = write(tmp_path / "c.toml", text)
    (line,) = problems(file=file)
    assert line.replace(str(file), "c.toml").startswith(problem)


def test_a_file_that_is_no_text_or_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xff\xfe")
    assert problems(file=file) == [f"{file}: is not UTF-8 text"]


def test_a_long_value_is_cut() -> None:
    (line,) = problems(flags={"registry.name": "x" * 5000})
    assert len(line) < 250


def test_a_secret_is_never_shown() -> None:
    class Vault(Section):
        api_key: SecretStr | None = None

    key = Key("client", "api_key", Vault.model_fields["api_key"])
    details = {"type": "x", "loc": ("client", "api_key"), "msg": "Input should be longer", "input": "hunter2"}
    line = _line(key, details, Setting("hunter2", "flag --api-key"))  # type: ignore[arg-type]
    assert line == "client.api_key = should be longer (flag --api-key)"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("mesh.trust_domain", "Chorus.local", "DNS name in lower case"),
        ("mesh.trust_domain", "10.0.0.1", "DNS name in lower case"),
        ("mesh.trust_domain", "a." * 100 + "b", "at most"),
        ("mesh.certs_dir", "", "should not be empty"),
        ("mesh.certs_dir", "a\0b", "zero bytes"),
        ("registry.name", "Two Words", "lower-case letters, digits and dashes"),
        ("registry.lease_ttl_s", "nan", "finite"),
        ("registry.lease_ttl_s", "0.1", "greater than or equal to 0.5"),
        ("registry.heartbeat_interval_s", "1.0", "less than half of registry.lease_ttl_s, which is 2"),
        ("registry.health_listen", "127.0.0.1:7101", "is the address of listen too"),
        ("runner.advertise", "0.0.0.0:7201", "cannot be dialled"),
        ("runner.advertise", "me@h:7201", "name is runner.name"),
        ("runner.registries", "[]", "at least one"),
        ("runner.registries", "a@h:1,b@h:1", "twice"),
        ("runner.registries", "[" * 100_000, "valid JSON"),
        ("runner.labels", "a=1,a=2", "names a twice"),
        ("runner.labels", "a", "key=value pairs"),
        ("runner.labels", "-=1", "label name"),
        ("runner.labels", "a=" + "x" * 64, "at most 63 printable characters"),
        ("runner.labels", ",".join(f"k{n}=v" for n in range(65)), "at most 64 labels"),
        ("runner.gpu_layers", "-2", "greater than or equal to -1"),
        ("coordinator.max_attempts", "0", "greater than or equal to 1"),
    ],
)
def test_bounds(key: str, value: str, problem: str) -> None:
    (line,) = problems(flags={key: value})
    assert line.startswith(key)
    assert problem in line
    assert "(flag --" in line


def test_a_default_that_no_longer_fits_is_named() -> None:
    (line,) = problems(environ={"CHORUS_REGISTRY__LEASE_TTL_S": "0.6"})
    assert line.startswith("registry.heartbeat_interval_s = 0.5: should be less than half of registry.lease_ttl_s")
    assert line.endswith("(default)")


def test_variables_that_are_not_ours_are_left_alone() -> None:
    environ = {
        "CHORUS_REGISTRY_PORT": "tcp://10.0.0.1:7101",  # Kubernetes, for a service named chorus-registry
        "CHORUS_RUNNER__NODE_ID": "",
        "PATH": "/bin",
    }
    assert load_config(environ=environ) == load_config(environ={})
    (line,) = problems(environ={"CHORUS_registry__listen": "h:1"})
    assert "did you mean CHORUS_REGISTRY__LISTEN?" in line


@pytest.mark.parametrize("spelling", ["a=1,b=x=y", ' {"a": "1", "b": "x=y"}'])
def test_tables_as_text(spelling: str) -> None:
    assert load_config(environ={"CHORUS_RUNNER__LABELS": spelling}).runner.labels == {"a": "1", "b": "x=y"}


@pytest.mark.parametrize("given", ["a, b", '["a", "b"]', ["a", "b"], ("a,b",)])
def test_lists_as_text_and_repeated_flags(given: object) -> None:
    assert load_config(flags={"runner.models": given}, environ={}).runner.models == ("a", "b")


def test_an_empty_list_differs_from_none() -> None:
    assert load_config(environ={"CHORUS_RUNNER__MODELS": "[]"}).runner.models == ()
    assert load_config(flags={"runner.models": []}, environ={}).runner.models is None


def test_relative_paths_belong_to_the_place_that_named_them(tmp_path: Path) -> None:
    file = write(tmp_path / "etc" / "c.toml", "[mesh]\ncerts_dir = 'certs'\n[log]\nfile = '~/x.log'\n")
    config = load_config(file=file, environ={"CHORUS_RUNNER__MODELS_DIR": "models"})
    assert config.mesh.certs_dir == tmp_path / "etc" / "certs"
    assert config.runner.models_dir == tmp_path / "models"
    assert config.log.file == Path("~/x.log").expanduser()


def test_where_a_runner_is_dialled() -> None:
    assert RunnerSettings().dial_address(4711) == Endpoint("127.0.0.1", 4711)
    everywhere = ListenAddress("0.0.0.0", 0)
    assert RunnerSettings(listen=everywhere, advertise=Endpoint("attic", 9)).dial_address(4711) == Endpoint("attic", 9)
    with pytest.raises(ConfigError, match=r"runner\.advertise: should be set"):
        RunnerSettings(listen=everywhere).dial_address(4711)


VARIABLES = ["LOG__LEVEL", "RUNNER__REGISTRIES", "RUNNER__LABELS", "RUNNER__SLOTS", "MESH__CERTS_DIR", "X__Y"]


@given(st.dictionaries(st.sampled_from(VARIABLES).map("CHORUS_{}".format), st.text(max_size=30)))
def test_any_environment_loads_or_is_refused_line_by_line(environ: dict[str, str]) -> None:
    refusal = ""
    try:
        load_config(environ=environ)
    except ConfigError as error:
        refusal = str(error)
    for line in refusal.splitlines():
        assert any(line.endswith(f"(environment variable {name})") for name in environ)
