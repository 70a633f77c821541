"""What every table of the configuration has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator


def absolute(path: Path) -> Path:
    """Returns `path` from the root, with `~` as the user's home; raises ValueError where it can be no path."""
    if "\0" in str(path):
        raise ValueError("should hold no zero bytes")
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError("names the home folder of a user who has none") from None


AbsolutePath = Annotated[Path, AfterValidator(absolute)]


class Section(BaseModel):
    """One table of the configuration. Immutable; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_strip_whitespace=True
    )

    flag_prefix: ClassVar[str] = ""
    """Comes before the key in the name of a command-line flag, where the key alone would be ambiguous."""

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_by_accident(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and not value.strip():
            raise ValueError("should not be empty")
        # pydantic reads true as 1, so `slots = true` would pass.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("should not be true or false")
        return value
