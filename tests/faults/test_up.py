"""`chorus up` with real processes that are killed: who comes back, who stays away, and what nobody notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from chorus.client import MeshClient
from chorus.core.fleet.events import DeltaEvent, DirectoryEvent, SnapshotEvent
from chorus.core.fleet.records import RunnerRecord, RunnerState
from chorus.core.generation import GenerationRequest, StopConditions, TextPrompt, TokenDelta
from tests.faults.up_process import DEADLINE_S, UpProcess, chorus, command, environment, free_base, wait_gone


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A supervised mesh that every test leaves whole."""
    with UpProcess(tmp_path_factory.mktemp("mesh")) as up:
        yield up.wait_ready()


class Watched:
    """A directory as a watcher knows it, with everybody who ever left."""

    def __init__(self) -> None:
        self.runners: dict[str, RunnerRecord] = {}
        self.left: list[str] = []
        self.synced = False

    def take(self, event: DirectoryEvent) -> None:
        self.synced = event.synced
        if isinstance(event, SnapshotEvent):
            records = {leased.record.runner.runner_id: leased.record for leased in event.runners}
            self.left += [name for name in self.runners if name not in records]
            self.runners = records
        elif isinstance(event, DeltaEvent):
            self.runners |= {leased.record.runner.runner_id: leased.record for leased in event.upserts}
            for removal in event.removals:
                self.left.append(removal.runner_id)
                self.runners.pop(removal.runner_id, None)

    def incarnation(self, name: str) -> int:
        record = self.runners.get(name)
        return record.runner.incarnation if record is not None and record.state is RunnerState.READY else 0


async def watch_until(client: MeshClient, watched: Watched, condition: Callable[[], bool]) -> None:
    """Follows the directory until `condition` holds."""
    async with asyncio.timeout(DEADLINE_S):
        async for event in client.watch_nodes():
            watched.take(event)
            if condition():
                return


# --- a mesh that works ----------------------------------------------------------------------------------------------


def test_it_answers_on_the_command_line(mesh: UpProcess) -> None:
    root = str(mesh.home.root)
    asked = chorus("ask", "--dir", root, "--json", "--max-tokens", "3", "echo:hello")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["runner_id"] in ("runner-1", "runner-2")
    assert answer["usage"]["completion_tokens"] == 3
    status = chorus("status", "--dir", root, "--json")
    seen = json.loads(status.stdout)
    assert (status.returncode, seen["problems"]) == (0, [])
    assert [runner["runner_id"] for node in seen["nodes"] for runner in node["runners"]] == ["runner-1", "runner-2"]
    explained = json.loads(chorus("explain", "--dir", root, "--json", "hello").stdout)
    assert {candidate["runner_id"] for candidate in explained["candidates"]} == {"runner-1", "runner-2"}


def test_piped_text_is_a_question_and_events_are_lines(mesh: UpProcess) -> None:
    done = subprocess.run(
        command("ask", "--dir", str(mesh.home.root), "--json-events", "--max-tokens", "2"),
        input="from a pipe",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events[-1] == "finished"
    assert events[0] == "started"
    assert "delta" in events


def test_a_conversation_can_be_piped_in(mesh: UpProcess) -> None:
    done = subprocess.run(
        command("chat", "--dir", str(mesh.home.root)),
        input="/system Be brief.\necho:first\n/nonsense\necho:second\n/quit\necho:never\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout.split() == ["first", "second"]
    assert "there is no /nonsense" in done.stderr


def test_an_unknown_model_is_an_error_that_names_those_there_are(mesh: UpProcess) -> None:
    asked = chorus("ask", "--dir", str(mesh.home.root), "--model", "gpt-17", "hello")
    assert asked.returncode == 1
    assert asked.stdout == ""
    assert "error: " in asked.stderr
    assert "fake-1b" in asked.stderr


def test_an_interrupted_question_ends_as_interrupted_and_frees_its_slot(mesh: UpProcess) -> None:
    asking = subprocess.Popen(
        command("ask", "--dir", str(mesh.home.root), "hello"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1)  # the answer has begun, at twenty tokens a second
    asking.send_signal(signal.SIGINT)
    _, stderr = asking.communicate(timeout=DEADLINE_S)
    assert asking.returncode == 130
    assert "Traceback" not in stderr
    asyncio.run(until_idle(mesh))


async def until_idle(mesh: UpProcess) -> None:
    def idle() -> bool:
        return bool(watched.runners) and not any(
            load.slots_used for record in watched.runners.values() for load in record.load.models
        )

    watched = Watched()
    async with mesh.client() as client:
        await watch_until(client, watched, idle)


def test_a_second_up_says_that_it_is_up(mesh: UpProcess) -> None:
    again = chorus("up", "--dir", str(mesh.home.root), "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert told["already_up"]
    assert told["supervisor"]["pid"] == mesh.process.pid


def test_taken_ports_are_named_with_who_has_them(mesh: UpProcess, tmp_path: Path) -> None:
    done = chorus("up", "--dir", str(tmp_path), "--port-base", str(mesh.base))
    assert done.returncode == 2
    assert (
        f"port {mesh.base + 1} (registry) is taken by process {mesh.process_of('registry').process.pid}" in done.stderr
    )  # type: ignore[union-attr]
    assert "--port-base" in done.stderr
    assert not (tmp_path / "mesh.json").exists()


# --- what is killed comes back --------------------------------------------------------------------------------------


async def test_a_killed_runner_is_back_by_itself_as_a_new_incarnation(mesh: UpProcess) -> None:
    watched = Watched()
    async with mesh.client() as client:
        await watch_until(client, watched, lambda: bool(watched.incarnation("runner-1")))
        before = watched.incarnation("runner-1")
        killed = mesh.kill("runner-1")
        await watch_until(client, watched, lambda: watched.incarnation("runner-1") > before)
    ended = await asyncio.to_thread(mesh.wait_for, "ended", name="runner-1")
    assert (ended["how"], ended["decision"]) == ("was killed by SIGKILL", "start_again")
    again = await asyncio.to_thread(mesh.wait_for, "started", name="runner-1")
    assert again["again"]
    assert again["pid"] != killed


async def test_a_registry_that_is_killed_loses_nobody_and_interrupts_nothing(mesh: UpProcess) -> None:
    watched = Watched()
    request = GenerationRequest(
        model="", prompt=TextPrompt("go on"), stop=StopConditions(max_tokens=2000, ignore_eos=True)
    )
    async with mesh.client() as client, client.generate(request) as generation, asyncio.timeout(DEADLINE_S):
        deltas = (event async for event in generation if isinstance(event, TokenDelta))
        next_index = await _follow(deltas, 3)
        await watch_until(client, watched, lambda: len(watched.runners) == 2)
        mesh.kill("registry")
        follow = asyncio.create_task(watch_until(client, watched, lambda: False))
        await asyncio.to_thread(mesh.wait_for, "serving", name="registry")
        # Only a registry that has lived for a whole lease says that it is synced: whoever is missing then is gone.
        while not (await client.list_nodes()).registries[0].synced:
            await anext(deltas)
            next_index += 1
        follow.cancel()
        await asyncio.wait({follow})
        nodes = await client.list_nodes()
        assert [leased.record.runner.runner_id for node in nodes.nodes for leased in node.runners] == [
            "runner-1",
            "runner-2",
        ]
        assert watched.left == []
        assert await _follow(deltas, 3, first=next_index) == next_index + 3


async def _follow(deltas: AsyncIterator[TokenDelta], count: int, first: int = 0) -> int:
    """Reads `count` tokens, none of which may be missing or come twice; returns the index after them."""
    for index in range(first, first + count):
        delta = await anext(deltas)
        assert (delta.index, len(delta.token_ids)) == (index, 1)
    return first + count


def test_after_three_failures_in_a_row_it_is_left_down_and_said_so(mesh: UpProcess) -> None:
    mesh.kill("runner-2")
    while (ended := mesh.wait_for("ended", name="runner-2"))["decision"] == "start_again":
        mesh.wait_for("started", name="runner-2")
        mesh.kill("runner-2")
    assert (ended["decision"], ended["failures"]) == ("leave_down", 3)
    assert mesh.process_of("runner-2").phase == "down"

    status = chorus("status", "--dir", str(mesh.home.root), "--json")
    assert status.returncode == 3
    assert any("runner-2" in problem and "left down" in problem for problem in json.loads(status.stdout)["problems"])
    doctor = chorus("doctor", "--dir", str(mesh.home.root), "--json")
    assert doctor.returncode == 1
    assert any("runner-2" in finding["message"] for finding in json.loads(doctor.stdout)["findings"])

    revived = chorus("up", "--dir", str(mesh.home.root), "--json")
    assert revived.returncode == 0, revived.stderr
    mesh.wait_for("serving", name="runner-2")
    assert mesh.process_of("runner-2").phase == "healthy"


# --- without supervision --------------------------------------------------------------------------------------------


async def test_unsupervised_a_killed_runner_is_gone_until_it_is_started_by_hand(tmp_path: Path) -> None:
    up = UpProcess(tmp_path, "--no-supervise")
    with up:
        await asyncio.to_thread(up.wait_ready)
        watched = Watched()
        async with up.client() as client:
            await watch_until(client, watched, lambda: bool(watched.incarnation("runner-1")))
            before = watched.incarnation("runner-1")
            up.kill("runner-1")
            await watch_until(client, watched, lambda: "runner-1" not in watched.runners)
            assert watched.left == ["runner-1"]
            ended = await asyncio.to_thread(up.wait_for, "ended", name="runner-1")
            assert ended["decision"] == "leave_down"
            by_hand = up.start_by_hand("runner-1")
            try:
                await watch_until(client, watched, lambda: watched.incarnation("runner-1") > before)
            finally:
                by_hand.terminate()
                assert await asyncio.to_thread(by_hand.wait, DEADLINE_S) == 0
        _check_that_a_killed_supervisor_leaves_nobody(up)


def _check_that_a_killed_supervisor_leaves_nobody(up: UpProcess) -> None:
    everybody = up.everybody()
    assert len(everybody) >= 4  # all but the runner that was killed, with what they started themselves
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.wait(DEADLINE_S)
    assert wait_gone(everybody) == []
    root = str(up.home.root)
    assert chorus("status", "--dir", root, "--json").returncode == 1
    down = chorus("down", "--dir", root)
    assert down.returncode == 0, down.stderr
    assert not up.home.state_file.exists()


# --- coming up and going down ---------------------------------------------------------------------------------------


def test_a_mesh_that_cannot_come_up_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with UpProcess(tmp_path, "--runners", "1") as up:
        for _ in range(3):
            os.kill(up.wait_for("started", name="runner-1")["pid"], signal.SIGKILL)
        assert up.wait_for("ended", name="runner-1", failures=3)["decision"] == "leave_down"
        everybody = up.everybody()
        assert up.process.wait(DEADLINE_S) == 1
        assert wait_gone(everybody) == []
    assert "error: the mesh did not come up: runner-1 (was killed by SIGKILL) is down" in up.stderr
    assert not up.home.state_file.exists()


def test_in_the_background_with_a_real_model_until_it_is_taken_down(tmp_path: Path) -> None:
    root = str(tmp_path / "mesh")
    real = {"CHORUS_RUNNER__ENGINE": "llama", "CHORUS_RUNNER__MODELS_DIR": str(tmp_path / "models")}
    up = chorus("up", "-d", "--dir", root, "--port-base", str(free_base()), **real)
    try:
        assert up.returncode == 0, up.stderr
        assert "SmolLM2-135M-Instruct.Q4_1" in up.stdout
        asked = chorus("ask", "--dir", root, "--json", "--max-tokens", "8", "Name a river.", **real)
        answer = json.loads(asked.stdout)
        assert answer["text"].strip()
        assert answer["artifact_sha256"].startswith("b179c9523d0e")
    finally:
        state = json.loads((tmp_path / "mesh" / "mesh.json").read_text())
        running = [psutil.Process(process["process"]["pid"]) for process in state["processes"]]
        running.append(psutil.Process(state["supervisor"]["pid"]))
        down = chorus("down", "--dir", root, "--json")
    assert down.returncode == 0, down.stderr
    report = json.loads(down.stdout)
    assert sorted(report["stopped"]) == ["coordinator", "registry", "runner-1", "runner-2"]
    assert report["killed"] == []
    assert not any(process.is_running() for process in running)
    again = chorus("down", "--dir", root)
    assert again.returncode == 0
    assert "nothing is up" in again.stderr


def test_the_demo_shows_an_answer_and_the_tls_that_it_came_over(tmp_path: Path) -> None:
    done = chorus("demo", "--json", "echo:a whole mesh for one answer", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["text"] == "a whole mesh for one answer"
    assert shown["runner_id"] == "runner-1"
    assert {role: seen["peer"].split("/")[3] for role, seen in shown["tls"].items()} == {
        role: role for role in ("registry", "runner", "coordinator")
    }
    assert all(seen["version"] == "TLSv1.3" and seen["refuses_strangers"] for seen in shown["tls"].values())
    assert list(tmp_path.iterdir()) == []
