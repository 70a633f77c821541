"""Checks of the keys that say where a coordinator reports what happens."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from chorus.core.events import EventKind

ALERTS = (
    EventKind.NODE_LOST,
    EventKind.RUNNER_LOST,
    EventKind.RUNNER_UNREACHABLE,
    EventKind.BREAKER_OPENED,
)
"""What somebody wants to be woken for, where nothing else is configured."""

_URL = re.compile(r"[\x21-\x7e]+")


def checked_urls(value: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the URLs. Raises ValueError, which never shows one: some services put a secret into the path."""
    for number, url in enumerate(value, start=1):
        which = f"URL {number} " if len(value) > 1 else "the URL "
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError(f"{which}should have HOST or HOST:PORT, with an IPv6 host in brackets") from None
        if not _URL.fullmatch(url) or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"{which}should begin with http://HOST or https://HOST")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"{which}should hold no user name or password; coordinator.webhook_secret_file signs")
    if len(set(value)) < len(value):
        raise ValueError("names the same URL twice")
    return value


def checked_kinds(value: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the kinds of events as EventKind spells them. Raises ValueError for one that there is not."""
    kinds = tuple(name.lower().replace("-", "_") for name in value)
    known = {kind.value for kind in EventKind}
    unknown = [name for name in kinds if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r} is no kind of event; there are {', '.join(sorted(known))}")
    if not kinds:
        raise ValueError("should name at least one kind; coordinator.webhooks = [] sends nothing")
    return tuple(dict.fromkeys(kinds))
