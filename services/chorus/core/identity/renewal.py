"""When a certificate is renewed, and when it is tried again after a failure."""

from __future__ import annotations

GRACE_S = 30 * 86_400.0
"""How long after its certificate's end a key that was not revoked may still renew it."""

_EARLIER = 0.05
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


def due_at(not_before: float, not_after: float, jitter: float) -> float:
    """When to renew, in the certificate's own clock: once a third of its time is left, or up to a twentieth earlier.

    `jitter`, from 0 to 1, keeps machines that joined together from renewing together.
    """
    life = not_after - not_before
    return not_after - life * (1 / 3 + _EARLIER * jitter)


def pause_s(failures: int, left_s: float, jitter: float) -> float:
    """How long to wait after that many failures in a row, `left_s` before the certificate ends (or since, negative).

    It doubles up to a minute, and leaves time for several tries while there is some.
    """
    pause = min(_PAUSE_S * 2.0 ** min(failures - 1, 10), _LONGEST_PAUSE_S)
    if left_s > 0:
        pause = min(pause, max(_PAUSE_S, left_s / 5))
    return pause * (0.75 + 0.5 * jitter)
