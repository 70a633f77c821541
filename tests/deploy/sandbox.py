"""A cluster's node as far as plain processes go: each pod a network namespace with its own address, on one bridge.

A container runs as its pod's specification says: command, args, environment, mounted Secrets, emptyDirs and hostPaths,
user and group, no capabilities, no new privileges, and a root that it can't write to. In that is what the folder
CHORUS_TEST_IMAGE has, an image's root (docs/k3s.md says how to get it), or else nothing but the system's programs and
this checkout. Services' names are written to each pod's hosts file, with the addresses of the
ready pods behind them; there is no address of a Service's own, and no enforcement of NetworkPolicies.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.edges import Pods
from tests.deploy.manifests import Document
from tests.mesh.child import ROOT, Child

USER = 10001
IMAGE = os.environ.get("CHORUS_TEST_IMAGE")
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib64")
_numbers = itertools.count(1)


def run(*words: str) -> str:
    """Runs a program of the system's to its end."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


def possible() -> bool:
    """Whether this process may make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


@dataclass(eq=False)
class Pod:
    """One pod: its address, its hosts file, and the folders that are mounted in it."""

    name: str
    of: Pods
    node: str
    namespace: str
    address: str
    folder: Path
    process: Child | None = None
    pid: int = 0
    volumes: dict[str, Path] = field(default_factory=dict)

    @property
    def stand_ins(self) -> Mapping[str, str]:
        """What the downward API tells."""
        return {"spec.nodeName": self.node, "metadata.name": self.name, "status.podIP": self.address}


class Cluster:
    """The bridge, the pods, and what they find under Services' names."""

    def __init__(self, documents: Sequence[Document], folder: Path, secrets: Mapping[str, Mapping[str, str]]) -> None:
        self.documents = tuple(documents)
        self._services = [document for document in documents if document["kind"] == "Service"]
        self._folder = folder
        self._secrets = secrets
        self._switch = f"chorus-{os.getpid()}"
        self._addresses = (f"10.42.0.{last}" for last in itertools.count(2))
        self.pods: list[Pod] = []
        self._ready: set[Pod] = set()

    @contextmanager
    def on(self) -> Iterator[None]:
        """The network, until the block is left; whatever still runs in it is killed."""
        run("ip", "netns", "add", self._switch)
        try:
            run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            run("ip", "-n", self._switch, "address", "add", "10.42.0.1/24", "dev", "bridge")
            yield
        finally:
            for pod in list(self.pods):
                self._remove(pod)
            run("ip", "netns", "delete", self._switch)

    # --- pods -------------------------------------------------------------------------------------------------------

    def pod(self, of: Pods, node: str, *, ordinal: int | None = None) -> Pod:
        """Makes a pod, in which nothing runs yet; one of a StatefulSet with its `ordinal`."""
        number = next(_numbers)
        name = f"{of.name}-{number if ordinal is None else ordinal}"
        namespace = f"{self._switch}-{number}"
        pod = Pod(name, of, node, namespace, next(self._addresses), self._folder / f"pod-{number}")
        pod.folder.mkdir(mode=0o755)
        (pod.folder / "root").mkdir()
        (pod.folder / "hosts").touch()
        run("ip", "netns", "add", namespace)
        self.pods.append(pod)
        link = f"veth{number}"
        run("ip", "-n", self._switch, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "-n", self._switch, "link", "set", link, "master", "bridge", "up")
        for words in (("link", "set", "lo", "up"), ("link", "set", "eth0", "up")):
            run("ip", "-n", namespace, *words)
        run("ip", "-n", namespace, "address", "add", f"{pod.address}/24", "dev", "eth0")
        self._make_volumes(pod)
        self._write_hosts()
        return pod

    async def start(self, pod: Pod, **environment: str) -> None:
        """Runs the init container `leaf`, if there is one, and then the pod's own, until it says that it serves."""
        for container in pod.of.template["spec"].get("initContainers", []):
            process = await self.execute(pod, container)
            assert await Child(process).ended() == 0, f"{pod.name}: {container['name']} failed"
        process = await self.execute(pod, pod.of.main, **environment)
        pod.process, pod.pid = Child(process), process.pid
        await pod.process.event("service.ready")

    async def execute(
        self, pod: Pod, container: Document, *, stdin: int = asyncio.subprocess.DEVNULL, **environment: str
    ) -> asyncio.subprocess.Process:
        """Starts a container of a pod; its first process is the one that is returned."""
        words = [*container.get("command", ["chorus"]), *container.get("args", [])]
        programs = Path("/opt/chorus/bin") if _has_image(container) else Path(sys.executable).parent
        variables = {"PATH": f"{programs}:/usr/bin:/bin", **self._variables(pod, container)}
        variables |= environment
        words = [self._expanded(word, variables) for word in words]
        script = "\n".join([*self._root(pod, container), self._exec(pod, variables, words)])
        return await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", pod.namespace, "unshare", "--mount", "sh", "-ec", script),
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )

    def becomes_ready(self, pod: Pod) -> None:
        """From now on its Services lead to it."""
        self._ready.add(pod)
        self._write_hosts()

    def leaves_services(self, pod: Pod) -> None:
        """From now on they don't, as when it is asked to end."""
        self._ready.discard(pod)
        self._write_hosts()

    async def kill(self, pod: Pod) -> None:
        """The pod is gone, and its address with it; others learn of it afterwards."""
        assert pod.process is not None
        run("ip", "-n", pod.namespace, "link", "set", "eth0", "down")
        run("kill", "-KILL", str(pod.pid))
        await pod.process.ended()
        self.leaves_services(pod)
        self._remove(pod)

    async def end(self, pod: Pod) -> int:
        """Asks it to end as the kubelet does, waits for that, and returns its exit code."""
        assert pod.process is not None
        self.leaves_services(pod)
        run("kill", "-TERM", str(pod.pid))
        code = await pod.process.ended()
        self._remove(pod)
        return code

    def connections(self, port: int) -> set[tuple[str, str]]:
        """(Who dialled, whom) of the connections to that port that stand now, as the listening pods see them."""
        by_address = {pod.address: pod.of.service for pod in self.pods}
        found = set()
        for pod in self.pods:
            words = ("ip", "netns", "exec", pod.namespace, "ss", "-Htn", "state", "established", f"( sport = :{port} )")
            for line in run(*words).splitlines():
                peer = line.split()[-1].rpartition(":")[0].strip("[]").removeprefix("::ffff:")
                if peer in by_address:
                    found.add((by_address[peer], pod.of.service))
        return found

    def listening(self, pod: Pod) -> set[int]:
        """The TCP ports on which something listens in a pod."""
        lines = run("ip", "netns", "exec", pod.namespace, "ss", "-Htln").splitlines()
        return {int(line.split()[3].rpartition(":")[2]) for line in lines}

    def scrape(self, pod: Pod) -> str:
        """Its metrics, as they are told on the port of that name."""
        ask = f"from urllib.request import *; print(urlopen('http://{pod.address}:{pod.of.ports()['metrics']}/metrics')"
        words = (sys.executable, "-c", f"{ask}.read().decode())")
        return run("ip", "netns", "exec", pod.namespace, *words)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _remove(self, pod: Pod) -> None:
        for pid in run("ip", "netns", "pids", pod.namespace).split():
            subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)
        run("ip", "netns", "delete", pod.namespace)
        self._ready.discard(pod)
        self.pods.remove(pod)

    def _write_hosts(self) -> None:
        lines = ["127.0.0.1 localhost"]
        for service in self._services:
            name, selector = service["metadata"]["name"], service["spec"]["selector"]
            behind = [pod for pod in self.pods if pod in self._ready and selector.items() <= pod.of.labels.items()]
            lines += [f"{pod.address} {name} {name}.chorus {name}.chorus.svc.cluster.local" for pod in behind]
        for pod in self.pods:
            # In place, for it is mounted as a file.
            (pod.folder / "hosts").write_text("\n".join([*lines, f"{pod.address} {pod.name}"]) + "\n")

    def _make_volumes(self, pod: Pod) -> None:
        for volume in pod.of.template["spec"].get("volumes", []):
            path = pod.folder / volume["name"]
            if "hostPath" in volume:
                path = self._folder / f"node-{pod.node}" / volume["name"]
            if "persistentVolumeClaim" in volume:
                path = self._folder / f"claims-{pod.name}" / volume["name"]
            path.mkdir(parents=True, exist_ok=True)
            os.chown(path, USER, USER)
            if "secret" in volume:
                mode, data = volume["secret"]["defaultMode"], self._secrets[volume["secret"]["secretName"]]
                named = volume["secret"].get("items", [{"key": key, "path": key} for key in data])
                for file, key in ((path / item["path"], item["key"]) for item in named):
                    file.write_bytes(base64.b64decode(data[key]))
                    file.chmod(mode)
                    os.chown(file, 0, USER)
            pod.volumes[volume["name"]] = path

    def _variables(self, pod: Pod, container: Document) -> dict[str, str]:
        made: dict[str, str] = {}
        for entry in container.get("env", []):
            if "value" in entry:
                made[entry["name"]] = self._expanded(str(entry["value"]), made)
            else:
                made[entry["name"]] = pod.stand_ins[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        return made

    @staticmethod
    def _expanded(text: str, variables: Mapping[str, str]) -> str:
        for name, value in variables.items():
            text = text.replace(f"$({name})", value)
        return text

    def _root(self, pod: Pod, container: Document) -> list[str]:
        """The commands that make a container's root folder; the mounts are gone with its last process."""
        root = pod.folder / "root"
        lines = ["mount --make-rprivate /"]
        lines += self._from_image(root) if _has_image(container) else self._from_system(root)
        lines += [f"mount --rbind /{name} {root}/{name}" for name in ("proc", "dev")]
        for mount in container.get("volumeMounts", []):
            lines += self._bound(
                root, pod.volumes[mount["name"]], mount["mountPath"], read_only=mount.get("readOnly", False)
            )
        if not _has_image(container):
            # After the pod's own volumes: one at /tmp would hide a checkout there.
            for path in dict.fromkeys((Path(sys.base_prefix), ROOT, Path(sys.prefix))):
                lines += self._bound(root, path, str(path), read_only=True)
            lines.append(f"mkdir -p {root}/etc")
            lines += [f"cp /etc/{name} {root}/etc/ 2>/dev/null || true" for name in ("ld.so.cache", "passwd", "group")]
        lines += [f"echo 'hosts: files' > {root}/etc/nsswitch.conf", f"touch {root}/etc/resolv.conf {root}/etc/hosts"]
        lines.append(f"mount --bind {pod.folder / 'hosts'} {root}/etc/hosts")
        return [*lines, f"mount -o remount,ro {root}"]

    def _from_system(self, root: Path) -> list[str]:
        lines = [f"mount -t tmpfs -o mode=0755 tmpfs {root}", f"mkdir {root}/proc {root}/dev"]
        for name in _SYSTEM:
            if Path("/", name).is_symlink():
                lines.append(f"cp -P /{name} {root}/{name}")
            elif Path("/", name).is_dir():
                lines += self._bound(root, Path("/", name), f"/{name}", read_only=True)
        return lines

    @staticmethod
    def _from_image(root: Path) -> list[str]:
        # Layers over it take the folders that volumes are mounted at, as a container runtime has them.
        layers = root.with_name("layers")
        options = f"lowerdir={IMAGE},upperdir={layers}/upper,workdir={layers}/work"
        return [
            f"mkdir -p {layers} && mount -t tmpfs tmpfs {layers} && mkdir {layers}/upper {layers}/work",
            f"mount -t overlay -o {options} overlay {root}",
        ]

    @staticmethod
    def _bound(root: Path, source: Path, target: str, *, read_only: bool) -> list[str]:
        lines = [f"mkdir -p {root}{target}", f"mount --bind {source} {root}{target}"]
        return [*lines, f"mount -o remount,ro,bind {root}{target}"] if read_only else lines

    @staticmethod
    def _exec(pod: Pod, variables: Mapping[str, str], words: Sequence[str]) -> str:
        limits = ["--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--no-new-privs"]
        limits += ["--bounding-set=-all", "--inh-caps=-all"]
        settings = [f"{name}={value}" for name, value in variables.items()]
        command = ["chroot", str(pod.folder / "root"), "setpriv", *limits, "env", "-i", *settings, *words]
        return f"exec {shlex.join(command)}"


def _has_image(container: Document) -> bool:
    """Whether that container has an image to run from: those of the tests themselves have none."""
    return IMAGE is not None and "image" in container
