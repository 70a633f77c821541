"""A leaf in a folder of its own, as a Secret of Kubernetes is mounted: what the kubelet puts there is taken over."""

from __future__ import annotations

import asyncio
from pathlib import Path

from chorus.config import MeshSettings
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport.keeping import keep_identity
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE


def mount(folder: Path, version: str, contents: dict[str, bytes]) -> None:
    """As the kubelet does: a folder for each version, and one link that is swapped over to the newest."""
    (folder / version).mkdir()
    for name, content in contents.items():
        (folder / version / name).write_bytes(content)
        (folder / version / name).chmod(0o440)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(version)
    (folder / "..new").replace(folder / "..data")


async def test_a_mounted_leaf_is_taken_over_when_the_kubelet_swaps_it(tmp_path: Path):
    mesh = MeshCertificates()
    older, newer = (mesh.leaf(Role.REGISTRY, "registry") for _ in range(2))
    files = {
        leaf: {CA_FILE: leaf.ca_pem, CERTIFICATE_FILE: leaf.cert_pem, KEY_FILE: leaf.key_pem} for leaf in (older, newer)
    }
    mount(tmp_path, "..1", files[older])
    settings = MeshSettings(certs_dir=tmp_path, trust_domain="test.chorus.local")
    identity = await keep_identity(settings, Role.REGISTRY, "registry")
    assert identity is not None
    assert identity.cert_pem == older.cert_pem
    changed = asyncio.Event()
    identity.on_change(changed.set)
    mount(tmp_path, "..2", files[newer])
    await changed.wait()
    assert (identity.cert_pem, identity.key_pem) == (newer.cert_pem, newer.key_pem)
