"""Somebody has copied a runner's key whose certificate names no machine, as cert-manager's do and old ones: it is good
for that runner, on the machine where that was first, and for nobody and nowhere else. (What of it depends on the host
that somebody speaks from is in tests/core/test_claims.py.)"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError, PermissionDeniedError
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from chorus.testing.certificates import LOOPBACK, MeshCertificates, tls_identity
from chorus.transport import open_channel
from chorus.wire.errors import from_rpc_error
from chorus.wire.resources import encode_runner_record
from tests.core.fleet_records import node, record

MESH = MeshCertificates()


class Scene:
    """A registry, and runners that speak to it with certificates that name a node or none."""

    def __init__(self, registry: RegistryService) -> None:
        self._registry = registry
        self._incarnations = itertools.count(1)

    async def registers(self, runner_id: str, node_id: str, *, named: str = "", by: str = "") -> ChorusError | None:
        """What is wrong with that, if anything is. The certificate is the runner's own, or that of the runner `by`."""
        holder = MESH.id(Role.RUNNER, by or runner_id)
        leaf = MESH.authority.issue(holder, MESH.policy, now=MESH.now, addresses=LOOPBACK, node=named or None)
        told = record(runner_id, next(self._incarnations), machine=node(node_id))
        told = replace(told, runner=replace(told.runner, server_name=MESH.id(Role.RUNNER, runner_id).dns_name))
        request = registry_pb2.RegisterRequest(record=encode_runner_record(told))
        server = MESH.id(Role.REGISTRY, "registry")
        async with open_channel(self._registry.address, identity=tls_identity(leaf), server=server) as channel:
            stub: Any = registry_pb2_grpc.RegistryStub(channel)
            try:
                await stub.Register(request, timeout=60)
            except grpc.RpcError as error:
                return from_rpc_error(error)
        return None

    async def leaves(self, runner_id: str) -> None:
        """An admin takes it out of the directory."""
        admin, server = MESH.identity(Role.ADMIN, "root"), MESH.id(Role.REGISTRY, "registry")
        async with open_channel(self._registry.address, identity=admin, server=server) as channel:
            stub: Any = registry_pb2_grpc.RegistryStub(channel)
            await stub.Deregister(registry_pb2.DeregisterRequest(runner_id=runner_id), timeout=60)


@asynccontextmanager
async def scene(**settings: str) -> AsyncIterator[Scene]:
    config = ChorusConfig.model_validate({"registry": {"listen": "127.0.0.1:0", **settings}})
    registry = RegistryService(config, identity=MESH.identity(Role.REGISTRY, "registry"))
    await registry.start()
    try:
        yield Scene(registry)
    finally:
        await registry.stop()


async def test_it_speaks_for_no_other_runner_and_moves_to_no_other_machine_also_while_its_own_is_away() -> None:
    async with scene() as here:
        assert await here.registers("attic", "node-attic") is None
        assert isinstance(await here.registers("desktop", "node-attic", by="attic"), PermissionDeniedError)
        for _ in range(2):
            error = await here.registers("attic", "node-away")
            assert isinstance(error, PermissionDeniedError)
            assert "was on node-attic" in error.message
            await here.leaves("attic")
        assert await here.registers("attic", "node-attic") is None


async def test_once_its_runner_has_one_that_names_the_machine_the_old_one_is_good_there_alone() -> None:
    async with scene() as here:
        assert await here.registers("attic", "node-attic", named="node-attic") is None
        assert isinstance(await here.registers("attic", "node-away"), PermissionDeniedError)
        assert await here.registers("attic", "node-cellar", named="node-cellar") is None  # it joined anew
        assert isinstance(await here.registers("attic", "node-attic"), PermissionDeniedError)


@pytest.mark.parametrize(("rule", "let"), [("certificate", False), ("any", True)])
async def test_a_registry_may_refuse_them_or_believe_all(rule: str, let: bool) -> None:
    async with scene(node_claims=rule) as here:
        assert await here.registers("desktop", "node-desktop", named="node-desktop") is None
        assert (await here.registers("attic", "node-attic") is None) is let
        assert (await here.registers("attic", "node-away") is None) is let
