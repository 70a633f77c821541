"""The keys of the answer cache."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from chorus.config.section import AbsolutePath, Section


class CacheSettings(Section):
    """Answers that a coordinator keeps and gives again, to the caller that had them."""

    flag_prefix: ClassVar[str] = "cache-"

    mode: Literal["off", "exact", "semantic"] = Field(
        default="off",
        description="What requests get that say nothing of a cache, where they are greedy or have a seed: off, exact "
        "(the answer to the very same request) or semantic (to a question that means the same, too). What runners "
        "stream to clients themselves, in direct mode, is not kept.",
    )
    store: Literal["sqlite", "valkey"] = Field(
        default="sqlite",
        description="Where answers are kept: by each coordinator for itself (sqlite), or in the server of "
        "valkey.url_file (valkey), for all coordinators that share it, unencrypted and for ttl_s at most; nothing of "
        "requests marked private is kept there.",
    )
    file: AbsolutePath | None = Field(
        default=None,
        description="SQLite file that keeps answers over restarts; one for each coordinator. Of no use with valkey.",
        json_schema_extra={"shown_default": "in memory"},
    )
    ttl_s: float = Field(default=86_400.0, gt=0, description="Seconds for which an answer is given again.")
    max_entries: int = Field(
        default=100_000, ge=1, le=10_000_000, description="Answers kept; those least used make room."
    )
    max_mib: int = Field(default=512, ge=1, le=1 << 20, description="Size of all answers kept, in MiB.")
    embedding_model: str | None = Field(
        default=None,
        description="Model whose vectors find questions that mean the same.",
        json_schema_extra={"shown_default": "any of the mesh that embeds"},
    )
    wrong_share: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Share of wrong answers allowed among semantic hits. Some hits are generated anyway and compared, "
        "more of them for an entry that was wrong.",
    )

    @property
    def is_shared(self) -> bool:
        """Whether answers are kept where other coordinators keep theirs, too: by a server on the network."""
        return self.store == "valkey"
