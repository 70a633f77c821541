"""One typed configuration: flags over environment over TOML file over defaults, documented where it is declared."""

from chorus.config.address import Endpoint, ListenAddress
from chorus.config.auditing import AuditSettings
from chorus.config.caching import CacheSettings
from chorus.config.callers import CallersSettings
from chorus.config.costs import CostSettings
from chorus.config.document import KeyDoc, OptionSpec, describe, option_specs
from chorus.config.export import to_env, to_toml
from chorus.config.load import LoadedConfig, load_config, load_with_origins
from chorus.config.sections import (
    ChorusConfig,
    ClientSettings,
    CoordinatorSettings,
    LogSettings,
    MeshSettings,
    RegistrySettings,
    RunnerSettings,
)
from chorus.config.valkey import ValkeySettings

__all__ = [
    "AuditSettings",
    "CacheSettings",
    "CallersSettings",
    "ChorusConfig",
    "ClientSettings",
    "CoordinatorSettings",
    "CostSettings",
    "Endpoint",
    "KeyDoc",
    "ListenAddress",
    "LoadedConfig",
    "LogSettings",
    "MeshSettings",
    "OptionSpec",
    "RegistrySettings",
    "RunnerSettings",
    "ValkeySettings",
    "describe",
    "load_config",
    "load_with_origins",
    "option_specs",
    "to_env",
    "to_toml",
]
