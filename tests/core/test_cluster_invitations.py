"""Whom the Job gives a token: everybody who needs one, and nobody else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.cluster.invitations import TOKEN_TTL_S, invite

NODES = st.sampled_from(["attic", "desktop", "laptop", "shed"])
SOME = st.frozensets(NODES)


@settings(max_examples=150)
@given(
    SOME,
    st.dictionaries(NODES, st.sampled_from(["t1", "t2", "t3"])),
    st.dictionaries(st.sampled_from(["t1", "t2", "t3"]), st.floats(0, 2 * TOKEN_TTL_S)),
    SOME,
    SOME,
    st.floats(0, TOKEN_TTL_S),
)
def test_who_needs_a_token_has_one_and_nobody_else(
    nodes: frozenset[str],
    stored: dict[str, str],
    open_until: dict[str, float],
    members: frozenset[str],
    shut_out: frozenset[str],
    now: float,
):
    decided = invite(nodes, stored, open_until, members, shut_out, now)
    kept, invited, withdrawn = map(set, (decided.kept, decided.invited, decided.withdrawn))
    assert len(kept) + len(invited) + len(withdrawn) == len(kept | invited | withdrawn)
    assert stored.keys() <= kept | invited | withdrawn
    assert invited == (nodes - members - shut_out) - kept
    assert kept <= stored.keys() & (nodes - shut_out)
    assert all(now < open_until.get(stored[node], 0.0) for node in kept)
    # What lies ready for a new node outlasts several more runs of the Job.
    assert all(open_until[stored[node]] > now + TOKEN_TTL_S / 2 for node in kept - members)


def test_what_was_laid_ready_by_hand_for_a_member_stays_until_it_is_used():
    assert invite(["attic"], {"attic": "t1"}, {"t1": 60.0}, {"attic"}, (), 50.0).kept == ("attic",)
    assert invite(["attic"], {"attic": "t1"}, {}, {"attic"}, (), 50.0).withdrawn == ("attic",)
