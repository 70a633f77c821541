"""The keys of the audit log."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from chorus.config.section import AbsolutePath, Section


class AuditSettings(Section):
    """Who did what to which model, key, token and node: a log of each service that shows when it was tampered with."""

    flag_prefix: ClassVar[str] = "audit-"

    dir: AbsolutePath | None = Field(
        default=None,
        description="Folder in which identity services, coordinators and runners keep audit logs, each in a folder of "
        "its own. `chorus audit verify` checks them.",
        json_schema_extra={"shown_default": "none; an identity service keeps one beside its ledger"},
    )
    prompts: bool = Field(default=False, description="Note the texts of prompts, too, with who sent them.")
    rotate_mib: int = Field(
        default=64, ge=1, le=4096, description="MiB at which a new file is begun. Chorus never removes one."
    )
