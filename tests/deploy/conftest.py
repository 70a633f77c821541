"""Every set of manifests that the tests look at."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.deploy.manifests import OVERLAYS, Document, overlay, variant

# What no overlay has: certificates by cert-manager or by the Job alone, and runners as a StatefulSet.
VARIANTS = {
    "cert-manager": ("gpu-nvidia", "mtls-cert-manager"),
    "identity": ("gpu-nvidia", "mtls-identity", "callers"),
    "selfsigned": ("gpu-nvidia", "mtls-selfsigned", "node-drain"),
    "statefulset": ("mtls-identity", "runner-statefulset", "observability"),
}
SETS = (*OVERLAYS, *VARIANTS)

Rendered = Callable[[str], tuple[Document, ...]]


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The documents of an overlay or a variant, by its name."""
    folder = tmp_path_factory.mktemp("variants")
    made: dict[str, tuple[Document, ...]] = {}

    def find(name: str) -> tuple[Document, ...]:
        if name in OVERLAYS:
            return overlay(name)
        if name not in made:
            made[name] = variant(folder / name, *VARIANTS[name])
        return made[name]

    return find
