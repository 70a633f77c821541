"""The catalog: models by name, where their files come from, and how to know that a file is the right one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from chorus.core.errors import ChorusError, ConfigError, UnknownModelError
from chorus.core.fleet.records import Tier
from chorus.models.naming import checked_family, checked_file_name, stem_of
from chorus.models.sources.source import parse_source

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model of a mesh that was told no other: small enough for any machine, and carried by a Python package."""

_MAX_CATALOG_BYTES = 4 << 20


def _valid(check: Callable[[str], object]) -> AfterValidator:
    def validate(value: str) -> str:
        try:
            check(value)
        except ChorusError as error:
            raise ValueError(str(error)) from None
        return value

    return AfterValidator(validate)


FamilyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$"), _valid(checked_family)]
FileName = Annotated[str, _valid(checked_file_name)]
SourceText = Annotated[str, _valid(parse_source)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogShape(_Table):
    """The dimensions that decide how much memory a model needs; published in its configuration file."""

    layers: int = Field(ge=1)
    embedding_length: int = Field(ge=1)
    feed_forward_length: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_length: int = Field(ge=1)
    vocabulary_size: int = Field(ge=1)


class CatalogArtifact(_Table):
    """One file of a family. Without `sha256`, the digest that its source tells is checked and recorded."""

    file: FileName
    quantization: str = Field(min_length=1)
    size_bytes: int = Field(ge=1)
    sha256: Sha256 | None = None
    sources: tuple[SourceText, ...] = Field(min_length=1)
    evidence: str = Field(min_length=1, description="How size and digest are known.")

    @property
    def name(self) -> str:
        """The artifact's name: its file's, without .gguf."""
        return stem_of(self.file)


class CatalogFamily(_Table):
    """A model, in one or several files."""

    name: FamilyName
    description: str = Field(min_length=1)
    license: str = Field(min_length=1)
    license_url: str = ""
    parameter_count: int = Field(ge=1)
    context_length: int = Field(ge=1, le=(1 << 31) - 1)
    tier: Tier
    tags: tuple[str, ...] = ()
    shape: CatalogShape | None = None
    artifacts: tuple[CatalogArtifact, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> CatalogFamily:
        expected = Tier.of_parameters(self.parameter_count)
        if self.tier is not expected:
            raise ValueError(f"tier should be {expected.value!r} for {self.parameter_count} parameters")
        names = [artifact.name.lower() for artifact in self.artifacts]
        if len(set(names)) < len(names):
            raise ValueError("two artifacts have the same file name")
        return self


class _CatalogFile(_Table):
    families: tuple[CatalogFamily, ...]


class Catalog:
    """Families by name. Immutable."""

    def __init__(self, families: Iterable[CatalogFamily]) -> None:
        """A later family replaces an earlier one of the same name."""
        self._families = {family.name: family for family in families}

    @classmethod
    def load(cls, extra: Sequence[Path] = ()) -> Catalog:
        """The catalog that comes with Chorus, and the files of the user's own on top of it, in order.

        Raises ConfigError that names the file and the key where one can't be read or makes no sense.
        """
        shipped = files("chorus.models").joinpath("catalog.toml").read_text(encoding="utf-8")
        families = list(_parse(shipped, "the shipped catalog"))
        for path in extra:
            families += _parse(_read(path), str(path))
        return cls(families)

    @property
    def families(self) -> tuple[CatalogFamily, ...]:
        """Every family, the smallest first."""
        return tuple(sorted(self._families.values(), key=lambda family: (family.parameter_count, family.name)))

    def entries(self) -> tuple[tuple[CatalogFamily, CatalogArtifact], ...]:
        """Every artifact with its family, the smallest first."""
        return tuple((family, artifact) for family in self.families for artifact in family.artifacts)

    def find(self, name: str) -> tuple[CatalogFamily, CatalogArtifact]:
        """Finds an artifact by family (its first artifact), `family:quantization`, artifact name or file name.

        Upper and lower case are the same. Raises UnknownModelError that names the families there are.
        """
        wanted = name.strip().lower()
        family_name, _, quantization = wanted.partition(":")
        family = self._families.get(family_name)
        if family is not None:
            for artifact in family.artifacts:
                if not quantization or artifact.quantization.lower() == quantization:
                    return family, artifact
            there_are = ", ".join(artifact.quantization for artifact in family.artifacts)
            raise UnknownModelError(f"the catalog has no {quantization.upper()} of {family.name}; it has {there_are}")
        for family, artifact in self.entries():
            if wanted in (artifact.name.lower(), artifact.file.lower()):
                return family, artifact
        raise UnknownModelError(
            f"the catalog has no model {name[:100]!r}; it has {', '.join(family.name for family in self.families)}"
        )

    def find_digest(self, sha256: str) -> tuple[CatalogFamily, CatalogArtifact] | None:
        """Finds the artifact with this digest, whatever it is called elsewhere."""
        return next(((f, a) for f, a in self.entries() if a.sha256 == sha256), None)


def resolve_default(catalog: Catalog | None = None) -> tuple[CatalogFamily, CatalogArtifact]:
    """The family and file of the default model."""
    return (catalog or Catalog.load()).find(DEFAULT_MODEL)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_CATALOG_BYTES:
            raise ConfigError(f"{path} is too large for a catalog of models")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the catalog {path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"the catalog {path} is not UTF-8 text") from None


def _parse(text: str, where: str) -> tuple[CatalogFamily, ...]:
    try:
        return _CatalogFile.model_validate(tomllib.loads(text)).families
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "families"
        raise ConfigError(f"{where}: {key}: {problem['msg']}", metadata={"keys": key}) from None
