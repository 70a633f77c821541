"""The keys of the Valkey (or Redis) server that coordinators share."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from chorus.config.section import AbsolutePath, Section


class ValkeySettings(Section):
    """A Valkey or Redis server (from version 6.2 on) that several coordinators share; it is used by what is told to."""

    flag_prefix: ClassVar[str] = "valkey-"

    url_file: AbsolutePath | None = Field(
        default=None,
        description="File that holds nothing but the server's URL, since that may hold a password: "
        "redis://[USER:PASSWORD@]HOST:PORT/DATABASE, rediss:// over TLS, unix:///PATH for a socket; valkey:// and "
        "valkeys:// are the same.",
    )
    prefix: str = Field(
        default="chorus:",
        min_length=1,
        max_length=64,
        description="What every key there begins with; meshes that share a server need one each.",
    )
    timeout_s: float = Field(
        default=0.5, gt=0, le=60, description="Seconds after which the server is held to be out of reach."
    )
