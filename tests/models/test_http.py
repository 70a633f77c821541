"""Downloads that break off, go on, start over, or are refused."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from chorus.core.errors import DownloadError
from chorus.models.progress import PullProgress, Reporter
from chorus.models.sources.addresses import names_a_private_place
from chorus.models.sources.http import Download, download, record_path
from tests.models.file_server import FileServer

CONTENT = bytes(range(256)) * 20_000  # five megabytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Pauses(list[float]):
    """Records pauses instead of making them."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf.part"


def get(server: FileServer, partial: Path, pauses: Pauses, path: str = "/m.gguf", **known: object) -> None:
    download(Download(server.url + path, **known), partial, Reporter(), pause=pauses)  # type: ignore[arg-type]


def test_a_download_in_one_go(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT)
    reports: list[PullProgress] = []
    download(Download(f"{server.url}/m.gguf", size_bytes=len(CONTENT)), partial, Reporter(reports.append), pause=pauses)
    assert partial.read_bytes() == CONTENT
    assert server.ranges("/m.gguf") == [None]
    assert reports[-1].done_bytes == reports[-1].total_bytes == len(CONTENT)
    done = [report.done_bytes for report in reports]
    assert done == sorted(done)
    assert pauses == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT, break_after=[1_000_000, 2_000_000])
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT
    assert server.ranges("/m.gguf") == [None, "bytes=1000000-", "bytes=3000000-"]
    assert len(pauses) == 2


def test_the_next_pull_goes_on_from_what_the_last_one_left(server: FileServer, partial: Path, pauses: Pauses) -> None:
    served = server.add("/m.gguf", CONTENT, break_after=[2_000_000] + [0] * 20)
    with pytest.raises(DownloadError, match="2000000 bytes are kept"):
        get(server, partial, pauses)
    assert partial.stat().st_size == 2_000_000
    served.break_after.clear()
    server.requests.clear()
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT
    assert server.ranges("/m.gguf") == ["bytes=2000000-"]


def test_giving_up_is_bounded_and_the_pauses_grow(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT, statuses=[503] * 100)
    with pytest.raises(DownloadError, match="503"):
        get(server, partial, pauses)
    assert len(server.requests) == 5
    assert pauses == sorted(pauses)
    assert len(set(pauses)) == len(pauses) == 4


def test_a_server_that_says_when_to_come_back_is_heeded(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT, statuses=[429], headers={"Retry-After": "7"})
    get(server, partial, pauses)
    assert pauses == [7.0]


def test_a_source_that_changed_is_fetched_anew(server: FileServer, partial: Path, pauses: Pauses) -> None:
    served = server.add("/m.gguf", b"old" * 1_000_000, break_after=[1_000_000] + [0] * 20)
    with pytest.raises(DownloadError):
        get(server, partial, pauses)
    served.break_after.clear()
    server.add("/m.gguf", CONTENT)
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT


def test_a_source_that_changed_its_length_and_knows_no_conditions(
    server: FileServer, partial: Path, pauses: Pauses
) -> None:
    served = server.add("/m.gguf", b"old" * 1_000_000, etag='"same"', break_after=[1_000_000] + [0] * 20)
    with pytest.raises(DownloadError):
        get(server, partial, pauses)
    server.add("/m.gguf", CONTENT, etag=served.etag)
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT


def test_without_anything_to_know_the_source_by_nothing_is_resumed(
    server: FileServer, partial: Path, pauses: Pauses
) -> None:
    served = server.add("/m.gguf", CONTENT, etag=None, break_after=[1_000_000] + [0] * 20)
    with pytest.raises(DownloadError):
        get(server, partial, pauses)
    served.break_after.clear()
    server.requests.clear()
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT
    assert server.ranges("/m.gguf") == [None]


def test_a_weak_tag_is_no_promise_but_a_date_is(server: FileServer, partial: Path, pauses: Pauses) -> None:
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    server.add("/m.gguf", CONTENT, etag='W/"weak"', last_modified=date, break_after=[1_000_000])
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT
    assert server.requests[1].headers["if-range"] == date


def test_a_known_digest_resumes_across_mirrors_with_other_tags(
    server: FileServer, partial: Path, pauses: Pauses
) -> None:
    served = server.add("/m.gguf", CONTENT, etag='"mirror one"', break_after=[1_000_000])
    server.answer = lambda seen: setattr(served, "etag", f'"{len(server.requests)}"')
    get(server, partial, pauses, sha256=SHA256)
    assert partial.read_bytes() == CONTENT
    assert server.ranges("/m.gguf") == [None, "bytes=1000000-"]


def test_a_server_without_ranges_starts_over(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT, ranges=False, break_after=[1_000_000])
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT


def test_a_server_without_a_length_is_read_to_the_end(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT, announce_length=False)
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT


def test_a_whole_partial_file_is_not_asked_for_again(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT)
    get(server, partial, pauses)
    get(server, partial, pauses)
    assert len(server.requests) == 1


def test_a_record_of_another_url_or_nonsense_resumes_nothing(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT)
    for record in (json.dumps({"url": "http://other/", "size": 9, "validator": '"x"'}), "{", "[]", '{"url": 1}'):
        partial.write_bytes(b"rubbish")
        record_path(partial).write_text(record)
        get(server, partial, pauses)
        assert partial.read_bytes() == CONTENT
    assert set(server.ranges("/m.gguf")) == {None}


def test_a_hard_link_left_by_another_pull_is_never_written_to(
    server: FileServer, partial: Path, pauses: Pauses, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"precious")
    os.link(precious, partial)
    server.add("/m.gguf", CONTENT)
    get(server, partial, pauses)
    assert precious.read_bytes() == b"precious"
    assert partial.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file"), (403, "denied"), (401, "login"), (410, "gone"), (418, "418")]
)
def test_refusals_are_final_and_explained(
    server: FileServer, partial: Path, pauses: Pauses, status: int, words: str
) -> None:
    server.add("/m.gguf", CONTENT, statuses=[status] * 9)
    with pytest.raises(DownloadError, match=words):
        get(server, partial, pauses)
    assert len(server.requests) == 1


def test_a_file_of_another_size_than_expected_is_not_downloaded(
    server: FileServer, partial: Path, pauses: Pauses
) -> None:
    server.add("/m.gguf", CONTENT)
    with pytest.raises(DownloadError, match="should have 17"):
        get(server, partial, pauses, size_bytes=17)
    assert not partial.exists()


def test_compressed_bodies_are_refused(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT, headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="compressed"):
        get(server, partial, pauses)


def test_redirects_are_followed_and_keep_tokens_to_themselves(
    server: FileServer, partial: Path, pauses: Pauses
) -> None:
    server.add("/m.gguf", CONTENT)
    port = server.url.rpartition(":")[2]
    server.add("/start", b"", redirect=f"http://localhost:{port}/m.gguf")
    get(server, partial, pauses, "/start", headers={"Authorization": "Bearer secret"})
    assert partial.read_bytes() == CONTENT
    assert server.requests[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in server.requests[1].headers


def test_a_redirect_away_from_encryption_is_not_followed(partial: Path, pauses: Pauses) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.scheme)
        return httpx.Response(302, headers={"Location": "http://models.example/m.gguf"})

    with pytest.raises(DownloadError, match="without encryption"):
        download(
            Download("https://models.example/m.gguf"),
            partial,
            Reporter(),
            transport=httpx.MockTransport(answer),
            pause=pauses,
        )
    assert asked == ["https"]


@pytest.mark.parametrize(
    "there", ["127.0.0.1", "169.254.169.254", "10.0.0.5", "192.168.1.1", "100.64.0.1", "[::1]", "[fd00::1]",
              "[::ffff:10.0.0.1]", "localhost"],
)  # fmt: skip
def test_a_public_link_leads_into_no_private_network(partial: Path, pauses: Pauses, there: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "models.example":
            return httpx.Response(302, headers={"Location": f"https://{there}/m.gguf"})
        return httpx.Response(200, stream=httpx.ByteStream(CONTENT))

    wanted, transport = Download("https://models.example/m.gguf"), httpx.MockTransport(answer)
    with pytest.raises(DownloadError, match="--allow-private"):
        download(wanted, partial, Reporter(), transport=transport, pause=pauses)
    assert asked == ["models.example"]
    assert not partial.exists()
    download(replace(wanted, allow_private=True), partial, Reporter(), transport=transport, pause=pauses)
    assert partial.read_bytes() == CONTENT


def test_a_name_that_turns_out_to_be_this_machines_gives_nothing(
    server: FileServer, partial: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("/m.gguf", CONTENT)
    port = server.url.rpartition(":")[2]
    real, answers = socket.getaddrinfo, ["93.184.215.14", "127.0.0.1"]

    def rebinding(host: object, *arguments: object, **named: object) -> object:
        """Another answer each time, as a name of an attacker's has: first a public address, then a private one."""
        return real(answers.pop(0) if answers else "127.0.0.1", *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with pytest.raises(DownloadError, match=r"private address 127\.0\.0\.1"):
        download(Download(f"http://models.example:{port}/m.gguf"), partial, Reporter(), pause=pauses)
    assert not partial.exists()


def test_who_names_a_private_place_himself_gets_it() -> None:
    for host in ("127.0.0.1", "192.168.1.9", "nas", "nas.lan", "nas.local", "::1", "files.home.arpa"):
        assert names_a_private_place(host), host
    for host in ("models.example", "8.8.8.8", "lan.example", "2606:4700::1111"):
        assert not names_a_private_place(host), host


def test_nobody_listening_is_said_plainly(partial: Path, pauses: Pauses) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1"):
        download(Download("http://127.0.0.1:9/m.gguf"), partial, Reporter(), pause=pauses)
    assert len(pauses) == 4


def test_a_full_disk_is_noticed_before_anything_is_written(
    server: FileServer, partial: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("/m.gguf", CONTENT)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(DownloadError, match="only 1 MiB are free"):
        get(server, partial, pauses)
    assert not partial.exists()


def test_an_interrupt_leaves_something_to_go_on_from(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT)

    def interrupt(report: PullProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(Download(f"{server.url}/m.gguf"), partial, Reporter(interrupt), pause=pauses)
    have = partial.stat().st_size
    assert 0 < have < len(CONTENT)
    get(server, partial, pauses)
    assert partial.read_bytes() == CONTENT
    assert server.ranges("/m.gguf")[1] == f"bytes={have}-"


def test_one_whose_place_was_taken_stops(server: FileServer, partial: Path, pauses: Pauses) -> None:
    server.add("/m.gguf", CONTENT)
    reporter = Reporter(lambda report: reporter.stop.set())
    with pytest.raises(DownloadError, match="took over"):
        download(Download(f"{server.url}/m.gguf"), partial, reporter, pause=pauses)
    assert partial.stat().st_size < len(CONTENT)
