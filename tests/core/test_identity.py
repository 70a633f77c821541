from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ChorusError, InvalidRequestError, PermissionDeniedError, UnauthenticatedError
from chorus.core.identity import Role, SpiffeId, authorize

EDGE = st.sampled_from(string.ascii_lowercase + string.digits)
MIDDLE = st.text(st.sampled_from(string.ascii_lowercase + string.digits + "-"), max_size=61)
LABELS = st.one_of(EDGE, st.builds(lambda a, b, c: a + b + c, EDGE, MIDDLE, EDGE))
DOMAINS = st.lists(LABELS, min_size=1, max_size=2).map(".".join)
IDENTITIES = st.builds(SpiffeId, DOMAINS, st.sampled_from(Role), LABELS)


@given(IDENTITIES)
def test_what_is_written_is_read_back(identity: SpiffeId) -> None:
    assert SpiffeId.parse(str(identity)) == identity
    assert identity.dns_name == f"{identity.name}.{identity.role.value}.{identity.trust_domain}"
    assert len(identity.dns_name) <= 253
    assert all(1 <= len(label) <= 63 for label in identity.dns_name.split("."))


@given(IDENTITIES, IDENTITIES)
def test_two_identities_never_share_a_pinned_name(one: SpiffeId, other: SpiffeId) -> None:
    if one.trust_domain == other.trust_domain:
        assert (one.dns_name == other.dns_name) == (one == other)


@given(st.text(max_size=400))
def test_any_text_is_an_identity_or_a_clear_refusal(text: str) -> None:
    for candidate in (text, f"spiffe://{text}", f"spiffe://home.internal/runner/{text}"):
        assert outcome(candidate) in (candidate, InvalidRequestError)


def outcome(text: str) -> str | type[Exception]:
    try:
        return str(SpiffeId.parse(text))
    except ChorusError as error:
        return type(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://home.internal/runner/a", "does not start with spiffe://"),
        ("spiffe://home.internal/runner", "three parts"),
        ("spiffe://home.internal/runner/a/b", "three parts"),
        ("spiffe://home.internal/king/a", "registry, runner, coordinator, client, admin"),
        ("spiffe://home.internal/Runner/a", "registry, runner, coordinator, client, admin"),
        ("spiffe://home.internal/runner/", "not a DNS label"),
        ("spiffe://home.internal/runner/A", "not a DNS label"),
        ("spiffe://home.internal/runner/a.b", "not a DNS label"),
        ("spiffe://home.internal/runner/-a", "not a DNS label"),
        ("spiffe://home.internal/runner/a\n", "not a DNS label"),
        ("spiffe://home.internal/runner/" + "a" * 64, "not a DNS label"),
        ("spiffe:///runner/a", "is empty"),
        ("spiffe://home..internal/runner/a", "not a DNS label"),
        ("spiffe://home.internal./runner/a", "not a DNS label"),
        ("spiffe://" + ".".join(["a" * 60] * 4) + "/runner/abcdef", "longer than the 253"),
    ],
)
def test_what_is_no_identity_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SpiffeId.parse(text)
    assert says in str(caught.value)


METHOD = "/chorus.api.registry.v1.Registry/Register"
RUNNER = SpiffeId("home.internal", Role.RUNNER, "laptop")


def test_a_listed_role_may_call() -> None:
    authorize({METHOD: frozenset({Role.RUNNER, Role.ADMIN})}, METHOD, RUNNER)


def test_another_role_may_not_and_is_told_who_may() -> None:
    with pytest.raises(PermissionDeniedError) as caught:
        authorize({METHOD: frozenset({Role.CLIENT, Role.ADMIN})}, METHOD, RUNNER)
    assert str(RUNNER) in caught.value.message
    assert METHOD in caught.value.message
    assert "admin, client" in caught.value.message
    assert caught.value.metadata["allowed_roles"] == "admin,client"


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("table", [{}, {METHOD: frozenset()}])
def test_what_the_table_does_not_give_is_denied_to_everybody(role: Role, table: dict[str, frozenset[Role]]) -> None:
    with pytest.raises(PermissionDeniedError, match="nobody may"):
        authorize(table, METHOD, SpiffeId("home.internal", role, "a"))


def test_nobody_in_particular_may_call_nothing() -> None:
    with pytest.raises(UnauthenticatedError, match="showed none"):
        authorize({METHOD: frozenset(Role)}, METHOD, None)


@given(st.dictionaries(st.sampled_from(["/a/A", "/a/B", "/b/A"]), st.frozensets(st.sampled_from(Role))), IDENTITIES)
def test_the_decision_is_the_table_and_nothing_else(table: dict[str, frozenset[Role]], caller: SpiffeId) -> None:
    for method in ("/a/A", "/a/B", "/b/A", "/b/B"):
        if caller.role in table.get(method, frozenset()):
            authorize(table, method, caller)
        else:
            with pytest.raises(PermissionDeniedError):
                authorize(table, method, caller)
