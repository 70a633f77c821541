"""What a person runs must not let gRPC's core write to the terminal beside it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from chorus.cli.main import ENTRIES

_SERVICES = {"registry", "runner", "coordinator"}  # they divide the core's log from their own
_MODULES = sorted({entry.target.split(":")[0] for entry in ENTRIES if entry.name not in _SERVICES})
_WATCH = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print("grpc", os.environ.get("GRPC_VERBOSITY"))

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", _MODULES)
def test_the_core_is_silenced_before_it_is_imported(module: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ran = subprocess.run(
        [sys.executable, "-c", _WATCH, module], env=environ, capture_output=True, text=True, check=True
    )
    assert ran.stdout in ("", "grpc NONE\n")
