"""The locks pin by SHA-256 and say nothing of where this or any machine gets its packages."""

import re
from pathlib import Path

import pytest

from lock import clean, locks

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def test_what_names_an_address_is_left_out_or_refused():
    pinned = f"grpcio==1.85.1 \\\n    --hash=sha256:{'a' * 64}\n"
    options = "--index-url https://mirror.example/simple\n--find-links /srv/wheels\n# via somewhere\n\n"
    assert clean(options + pinned) == pinned
    with pytest.raises(ValueError, match="an address got into a lock"):
        clean("grpcio @ https://mirror.example/grpcio.whl\n")


@pytest.mark.parametrize("lock", locks(), ids=lambda lock: lock.name)
def test_every_package_of_every_lock_is_pinned_and_hashed(lock):
    text = (REQUIREMENTS / f"{lock.name}.txt").read_text(encoding="utf-8")
    assert "://" not in text
    packages = re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert packages
    for package in packages:
        assert re.match(r"[a-z0-9][a-z0-9._-]*==\S+", package), package
        assert "--hash=sha256:" in package, package
