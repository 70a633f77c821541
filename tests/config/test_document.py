"""What is generated from the models: documentation, options, and the configuration written back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.config import ChorusConfig, describe, load_config, option_specs, to_env, to_toml
from chorus.config.document import Kind, toml_value
from chorus.config.sections import SECTIONS

SERVICES = ["registry", "runner", "coordinator", "client"]


def test_every_key_is_documented() -> None:
    rows = describe(include_hidden=True)
    assert {row.key for row in rows} == {
        f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields
    }
    assert [row.key for row in rows if not row.help.endswith(".")] == []
    assert len({row.env for row in rows}) == len(rows)


def test_a_row_of_the_documentation() -> None:
    (row,) = (row for row in describe("registry") if row.key == "registry.lease_ttl_s")
    assert (row.type, row.default, row.env, row.flag) == (
        "number",
        "2.0",
        "CHORUS_REGISTRY__LEASE_TTL_S",
        "--lease-ttl-s",
    )


def test_documentation_is_the_same_on_every_machine() -> None:
    assert not any(str(Path.home()) in row.default for row in describe())


def test_hidden_keys_are_left_out() -> None:
    assert "runner.engine" not in {row.key for row in describe()}
    assert [option.key for option in option_specs(*SECTIONS) if option.hidden] == ["runner.engine"]


def test_defaults_as_documented_are_the_defaults() -> None:
    lines = [f"{row.key} = {row.default}" for row in describe() if row.default and not row.default.startswith("(")]
    tables = tomllib.loads("\n".join(lines))
    assert ChorusConfig.model_validate(tables) == ChorusConfig()


@pytest.mark.parametrize("service", SERVICES)
def test_the_options_of_one_command_are_unambiguous(service: str) -> None:
    options = option_specs("mesh", "log", service)
    flags = [flag for option in options for flag in (option.flag, option.negative_flag) if flag]
    assert len(set(flags)) == len(flags)
    assert all(option.parameter.isidentifier() for option in options)
    assert all(option.choices for option in options if option.kind is Kind.CHOICE)


def test_an_option_tells_default_and_variable() -> None:
    options = {option.key: option for option in option_specs("registry", "runner", "log")}
    assert options["registry.lease_ttl_s"].help.endswith("[default: 2.0; env: CHORUS_REGISTRY__LEASE_TTL_S]")
    assert options["runner.allow_load"].negative_flag == "--no-allow-load"
    assert options["runner.registries"].multiple
    assert options["runner.registries"].metavar == "[NAME@]HOST:PORT"
    assert options["log.level"].flag == "--log-level"


labels = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,10}[A-Za-z0-9])?", fullmatch=True),
    st.text(max_size=20).filter(str.isprintable).map(str.strip).filter(bool),
    max_size=5,
)


@st.composite
def configurations(draw: st.DrawFn) -> ChorusConfig:
    return ChorusConfig.model_validate(
        {
            "registry": {
                "listen": draw(st.sampled_from(["127.0.0.1:0", "[::1]:7101", "attic.lan:1"])),
                "lease_ttl_s": draw(st.floats(1.1, 600)),
            },
            "runner": {
                "name": draw(st.none() | st.just("attic")),
                "models": draw(st.none() | st.lists(st.text(min_size=1).map(str.strip).filter(bool))),
                "models_dir": draw(st.sampled_from(["/models", '/with "quotes"', "/häuser/\x7f\\n", "/a\nb"])),
                "labels": draw(labels),
                "registries": draw(st.lists(st.sampled_from(["h:1", "b@h:2", "[::1]:3"]), min_size=1, unique=True)),
                "allow_load": draw(st.booleans()),
            },
        }
    )


@given(configurations())
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, config: ChorusConfig) -> None:
    file = tmp_path_factory.getbasetemp() / "written.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    empty = tmp_path_factory.getbasetemp() / "empty.toml"
    empty.touch()
    assert load_config(file=file, environ={}) == config
    assert load_config(file=empty, environ=to_env(config)) == config


def test_one_section_can_be_written_alone() -> None:
    assert set(tomllib.loads(to_toml(ChorusConfig(), "mesh", "registry"))) == {"mesh", "registry"}
    assert all(name.startswith("CHORUS_LOG__") for name in to_env(ChorusConfig(), "log"))


@given(st.recursive(st.text() | st.integers() | st.booleans() | st.floats(allow_nan=False), st.lists, max_leaves=5))
def test_toml_values_read_back(value: object) -> None:
    try:
        text = f"x = {toml_value(value)}".encode().decode()
    except UnicodeEncodeError:
        return  # a lone surrogate cannot stand in any file
    assert tomllib.loads(text)["x"] == value
