"""The controller beside a simulated API server: watches that end, expire and carry bookmarks; what it patches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chorus.core.errors import ConfigError, UnavailableError
from chorus.k8s.cluster import Cluster
from chorus.k8s.draining import NodeWatcher
from tests.deploy.api_server import ApiServer, node, serving

LABEL = "chorus.mesh/drain"
NODES = "/api/v1/nodes"


class Clock:
    """A clock that is set by hand, and notes who slept."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if len(self.slept) > 3:
            raise KeyboardInterrupt


class Scene:
    """A server, a watcher and a clock."""

    def __init__(self, api: ApiServer, cluster: Cluster) -> None:
        self.api, self.clock = api, Clock()
        self.watcher = NodeWatcher(cluster, not_ready_after_s=30, clock=lambda: self.clock.now, sleep=self.clock.sleep)

    def has(self, *nodes: dict[str, Any]) -> None:
        for document in nodes:
            self.api.put(f"{NODES}/{document['metadata']['name']}", document)

    def marks(self) -> dict[str, str | None]:
        return {
            document["metadata"]["name"]: document["metadata"]["labels"].get(LABEL)
            for document in self.api.objects.values()
        }

    def watched(self) -> list[dict[str, str]]:
        return [query for _, path, query in self.api.asked if path == NODES and "watch" in query]

    def listings(self) -> int:
        return sum(path == NODES and "watch" not in query for _, path, query in self.api.asked)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with serving(tmp_path) as (api, cluster):
        yield Scene(api, cluster)


def event(kind: str, document: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": document}


def test_a_cordoned_node_is_marked_and_unmarked_when_it_is_back(scene: Scene):
    scene.has(node("desktop"), node("laptop"), node("server", runs=False, cordoned=True))
    scene.api.watches += [[]]
    scene.watcher.step()
    cordoned = node("desktop", cordoned=True)
    scene.has(cordoned)
    scene.api.watches += [[event("MODIFIED", cordoned)]]
    scene.watcher.step()
    assert scene.marks() == {"desktop": "cordoned", "laptop": None, "server": None}
    back = node("desktop", mark="cordoned")
    scene.has(back)
    scene.api.watches += [[event("MODIFIED", back)]]
    scene.watcher.step()
    assert scene.marks() == {"desktop": None, "laptop": None, "server": None}
    assert [patch for _, patch in scene.api.patches] == [
        {"metadata": {"labels": {LABEL: "cordoned"}}},
        {"metadata": {"labels": {LABEL: None}}},
    ]
    assert scene.listings() == 1
    assert [query["resourceVersion"] for query in scene.watched()] == ["103", "103", "104"]
    assert all(query["allowWatchBookmarks"] == "true" for query in scene.watched())


def test_what_was_so_before_it_came_counts_too(scene: Scene):
    scene.has(node("desktop", cordoned=True), node("laptop", mark="cordoned"))
    scene.api.watches += [[]]
    scene.watcher.step()
    assert scene.marks() == {"desktop": "cordoned", "laptop": None}


def test_bookmarks_move_the_watch_on_without_naming_anybody(scene: Scene):
    scene.has(node("desktop"))
    bookmark = {"kind": "Node", "metadata": {"resourceVersion": "555"}}
    scene.api.watches += [[event("BOOKMARK", bookmark)], []]
    scene.watcher.step()
    scene.watcher.step()
    assert scene.watched()[-1]["resourceVersion"] == "555"
    assert scene.listings() == 1
    assert scene.api.patches == []


@pytest.mark.parametrize("how", ["event", "status"])
def test_a_version_that_is_too_old_means_listing_anew(scene: Scene, how: str):
    scene.has(node("desktop"), node("laptop"))
    gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version: 103 (900)"}
    scene.api.watches += [[event("ERROR", gone)] if how == "event" else 410]
    scene.watcher.step()
    # Meanwhile, unheard: one was cordoned, the other one left the cluster.
    scene.has(node("desktop", cordoned=True))
    del scene.api.objects[f"{NODES}/laptop"]
    scene.api.watches += [[]]
    scene.watcher.step()
    assert scene.listings() == 2
    assert scene.marks() == {"desktop": "cordoned"}


def test_a_node_that_is_lost_is_marked_after_a_while(scene: Scene):
    scene.has(node("desktop"), node("laptop"))
    scene.api.watches += [[event("MODIFIED", node("desktop", version=300, ready="Unknown"))], []]
    scene.watcher.step()
    assert scene.marks()["desktop"] is None
    scene.watcher.step()
    # Nothing more is heard of it, so the watch lasts no longer than the wait.
    assert [query["timeoutSeconds"] for query in scene.watched()] == ["300", "30"]
    scene.clock.now += 30
    scene.api.watches += [[], [event("MODIFIED", node("desktop", version=400, mark="not-ready"))]]
    scene.watcher.step()
    assert scene.marks() == {"desktop": "not-ready", "laptop": None}
    scene.watcher.step()
    assert scene.marks() == {"desktop": None, "laptop": None}


def test_a_node_that_goes_while_it_is_marked_is_let_go(scene: Scene):
    scene.has(node("desktop"))
    scene.api.watches += [
        [event("MODIFIED", node("ghost", version=250, cordoned=True)), event("DELETED", node("ghost", version=251))],
        [],
    ]
    scene.watcher.step()
    scene.watcher.step()
    assert scene.watched()[-1]["resourceVersion"] == "251"
    assert scene.api.patches == []


def test_a_server_that_does_not_answer_is_asked_again_less_and_less_often(scene: Scene):
    scene.has(node("desktop"))
    with pytest.raises(KeyboardInterrupt):
        scene.watcher.run()  # every watch is refused with 503; the clock ends it
    assert scene.clock.slept == [1, 2, 5, 10]
    assert scene.listings() == 1


def test_the_token_is_read_anew_for_each_request(scene: Scene, tmp_path: Path):
    scene.has(node("desktop"))
    scene.api.token = "renewed"
    with pytest.raises(UnavailableError, match="401"):
        scene.watcher.step()
    (tmp_path / "token").write_text("renewed")
    scene.api.watches += [[]]
    scene.watcher.step()


def test_outside_of_a_cluster_it_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="in a pod"):
        Cluster.in_pod({}, tmp_path)
    with pytest.raises(ConfigError, match="automountServiceAccountToken"):
        Cluster.in_pod({"KUBERNETES_SERVICE_HOST": "10.43.0.1"}, tmp_path)
