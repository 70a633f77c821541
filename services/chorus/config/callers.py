"""The keys of callers without a certificate: where they come, what is kept of them, whose tokens are believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field

from chorus.config.address import ListenAddress
from chorus.config.section import AbsolutePath, Section
from chorus.config.texts import list_of_text, map_of_text
from chorus.core.callers import parse_grant
from chorus.core.errors import InvalidRequestError

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures with a key that is the provider's alone; those by a shared secret, or none, are never believed."""


def _algorithms(value: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in value if name not in ALGORITHMS]
    if unknown or not value:
        raise ValueError(f"should be some of {', '.join(ALGORITHMS)}")
    return value


def _grants(value: Mapping[str, str]) -> Mapping[str, str]:
    for name, text in value.items():
        try:
            parse_grant(text)
        except InvalidRequestError as error:
            raise ValueError(f"what {name} grants is wrong: {error.message}") from None
    return value


def _jwks(value: str | None) -> str | None:
    if value is not None and "://" in value and not value.startswith("https://"):
        raise ValueError("should be a file or an https:// URL: whoever changes it on the way could be anybody")
    return value


class CallersSettings(Section):
    """People and programs without a certificate: API keys, tokens of an identity provider, quotas."""

    flag_prefix: ClassVar[str] = "callers-"

    listen: ListenAddress | None = Field(
        default=None,
        description="Address where a coordinator serves callers who show an API key or a token in place of a "
        "certificate, over TLS. Keys and limits are there only with it.",
        json_schema_extra={"shown_default": "nobody without a certificate is served"},
    )
    dir: AbsolutePath = Field(
        default_factory=lambda: platformdirs.user_data_path("chorus") / "callers",
        description="Folder with the keys' pepper and, where store is file, the keys and what was used. Coordinators "
        "on one machine share it; where store is valkey, each needs a copy of the file pepper in it.",
        json_schema_extra={"shown_default": "callers in the user's data folder"},
    )
    store: Literal["file", "valkey"] = Field(
        default="file",
        description="Where keys and quotas are kept: file (SQLite, for the coordinators of one machine) or valkey (see "
        "valkey.url_file), for those of several. While it can't be asked, keys with limits are refused.",
    )
    oidc_issuer: str | None = Field(
        default=None, description="Issuer of an identity provider (OIDC) whose signed tokens are believed, too."
    )
    oidc_audience: str | None = Field(default=None, description="What such a token must be meant for (aud).")
    oidc_jwks: Annotated[str | None, AfterValidator(_jwks)] = Field(
        default=None,
        description="The issuer's public keys (JWKS): a file, or an https:// URL, fetched every 10 minutes.",
    )
    oidc_ca: AbsolutePath | None = Field(
        default=None,
        description="Authorities (PEM) by which that URL's certificate is checked, in place of those that are known to "
        "all: for a provider of one's own, which may be at a private address.",
        json_schema_extra={"shown_default": "the public ones"},
    )
    oidc_algorithms: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(list_of_text), AfterValidator(_algorithms)
    ] = Field(default=("RS256", "ES256"), description="Algorithms of signatures that are believed.")
    oidc_claim: str = Field(
        default="groups", description="Claim of a token, words or a list, that says what its holder may do."
    )
    oidc_grants: Annotated[Mapping[str, str], BeforeValidator(map_of_text), AfterValidator(_grants)] = Field(
        default={},
        description="What each value of that claim grants, as in staff='models=qwen3-*|smollm2-* priorities=batch "
        "requests_per_minute=60'; the first that a token has counts, and * is anybody's.",
    )
