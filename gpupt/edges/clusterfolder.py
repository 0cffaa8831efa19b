"""The gate to STATE/clusters/NAME: a cluster's keys, what was decided for it, its overlays.

::

    id_ed25519(.pub)            the key that opens every node
    known_hosts                 the host keys that were made for the nodes
    cluster.json                the allocation and the image's digest
    nodes/NODE/disk.qcow2       the node's overlay
    nodes/NODE/credentials/     files that QEMU hands to the guest (libvirt lends them to its user)

Folders may be passed through by QEMU's user and read by root alone.  STATE/logs/NAME holds
the consoles, which outlive a cluster that did not come up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpupt.edges import codec
from gpupt.edges.keys import make_key_pair, write_private
from gpupt.edges.process import run
from gpupt.errors import BadInput, Failed
from gpupt.model.cluster import Allocation
from gpupt.model.roll import Image

RECORD = "cluster.json"
PASSABLE = 0o711
# What a node's systemd takes, by the names that the images' units ask for.
AUTHORIZED_KEYS = "ssh.authorized_keys.root"
HOST_KEY = "gpupt.ssh_host_ed25519_key"
HOSTS = "gpupt.hosts"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """What was decided when the cluster was made."""

    allocation: Allocation
    image: str


class ClusterFolder:
    """The folder of one cluster, there or not."""

    def __init__(self, state: Path, cluster: str) -> None:
        if not _NAME.fullmatch(cluster):
            raise BadInput(
                f"{cluster!r} is not a cluster's name",
                details="expected lower-case letters, digits and inner hyphens",
            )
        # QEMU and libvirtd work in other folders than this process.
        state = state.absolute()
        self.cluster = cluster
        self.path = state / "clusters" / cluster
        self.logs = state / "logs" / cluster

    @property
    def key(self) -> Path:
        return self.path / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.path / "known_hosts"

    def node(self, name: str) -> Path:
        """The node's own folder; raises BadInput for a name that would lead elsewhere."""
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name!r} is not a node's name")
        return self.path / "nodes" / name

    def disk(self, node: str) -> Path:
        return self.node(node) / "disk.qcow2"

    def credential(self, node: str, name: str) -> Path:
        return self.node(node) / "credentials" / name

    def console(self, node: str) -> Path:
        return self.log(node, "console")

    def log(self, node: str, kind: str) -> Path:
        """Where the node's log of that kind is kept."""
        self.node(node)
        return self.logs / f"{node}.{kind}.log"

    def keep_log(self, node: str, kind: str, text: str) -> None:
        """Keep a log of the node, for its owner alone; raises Failed."""
        self.make_log_folder()
        file = self.log(node, kind)
        try:
            file.write_text(text, encoding="utf-8")
            file.chmod(0o600)
        except OSError as error:
            raise Failed(f"cannot write {file}", details=str(error)) from None

    @property
    def exists(self) -> bool:
        """Whether anything of the cluster is on the disk."""
        return self.path.is_dir()

    def read(self) -> ClusterRecord | None:
        """The record; None when the cluster was never made, or not to its end."""
        try:
            text = (self.path / RECORD).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Failed(f"cannot read {self.path / RECORD}", details=str(error)) from None
        try:
            record = json.loads(text)
            allocation = codec.from_plain(record["allocation"])
            if not isinstance(allocation, Allocation):
                raise TypeError("not an allocation")
            return ClusterRecord(allocation, str(record["image"]))
        except (ValueError, KeyError, TypeError) as error:
            raise Failed(
                f"the record of cluster {self.cluster} cannot be read",
                details=(str(self.path / RECORD), f"{type(error).__name__}: {error}"),
                remedy=f"gpupt down {self.cluster} goes by libvirt and the loans alone",
            ) from None

    def make(self, allocation: Allocation, *, image: str, hosts: str) -> None:
        """Make the folder, with keys and credentials for every node; the record comes last."""
        self.require_passable()
        for folder in (self.path.parent, self.path, self.path / "nodes"):
            folder.mkdir(mode=PASSABLE, exist_ok=True)
            folder.chmod(PASSABLE)
        pair = make_key_pair(f"gpupt@{self.cluster}")
        self.key.unlink(missing_ok=True)
        write_private(self.key, pair.private)
        self.key.with_suffix(".pub").write_text(pair.public + "\n")
        known = []
        for placement in allocation.placements:
            name = placement.node.name
            host = make_key_pair(f"root@{name}")
            folder = self.node(name) / "credentials"
            for each in (folder.parent, folder):
                each.mkdir(mode=PASSABLE, exist_ok=True)
                each.chmod(PASSABLE)
            secrets = {AUTHORIZED_KEYS: pair.public + "\n", HOST_KEY: host.private, HOSTS: hosts}
            for credential, text in secrets.items():
                self.credential(name, credential).unlink(missing_ok=True)
                write_private(self.credential(name, credential), text)
            kind, blob = host.public.split()[:2]
            known.append(f"{name},{placement.ip} {kind} {blob}\n")
        self.known_hosts.write_text("".join(known))
        self.known_hosts.chmod(0o600)
        self._write_record(ClusterRecord(allocation, image))

    def _write_record(self, record: ClusterRecord) -> None:
        plain = {
            "schema": 1,
            "image": record.image,
            "allocation": codec.to_plain(record.allocation),
        }
        half = self.path / f".{RECORD}"
        half.unlink(missing_ok=True)
        write_private(half, json.dumps(plain, indent=2) + "\n")
        half.replace(self.path / RECORD)

    def host_key(self, node: str) -> str:
        """The public host key that was made for the node; raises Failed."""
        try:
            lines = self.known_hosts.read_text().splitlines()
        except OSError as error:
            raise Failed(
                f"the host keys of cluster {self.cluster} are gone",
                details=str(error),
                remedy=f"gpupt down {self.cluster}, then up again",
            ) from None
        for line in lines:
            names, _, key = line.partition(" ")
            if node in names.split(","):
                return key
        raise Failed(f"no host key was made for {node} of {self.cluster}")

    def make_disk(self, node: str, *, image: Image, size: int) -> bool:
        """Make the node's overlay of at least ``size`` bytes; False when it is there already
        (a node that comes up again after a reboot of the host keeps its disk)."""
        disk = self.disk(node)
        if disk.exists():
            return False
        half = disk.with_suffix(".part")
        half.unlink(missing_ok=True)
        run(
            [
                *("qemu-img", "create", "-q", "-f", "qcow2"),
                *("-F", image.format, "-b", str(image.disk)),
                *(str(half), str(max(size, image.virtual_size))),
            ],
            deadline=60,
        )
        # What a node writes is not for every user of the host; libvirt lends it to QEMU's.
        half.chmod(0o600)
        half.replace(disk)
        return True

    def make_log_folder(self) -> None:
        """Make the folder of the consoles, which virtlogd writes as root."""
        for folder in (self.logs.parent, self.logs):
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)

    def last_words(self, node: str, *, lines: int = 15) -> tuple[str, ...]:
        """The end of the node's console, and where the whole of it is; empty if there is none."""
        try:
            raw = self.console(node).read_bytes()[-16384:]
        except OSError:
            return ()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode("utf-8", "backslashreplace"))
        said = [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
        return (f"its console, in {self.console(node)}, ends:", *(f"  {line}" for line in said))

    def remove_disk(self, node: str) -> None:
        """Remove the node's overlay; nothing to do when there is none."""
        for file in (self.disk(node), self.disk(node).with_suffix(".part")):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with everything in it, the keys first."""
        self.key.unlink(missing_ok=True)
        (self.path / RECORD).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)

    def remove_logs(self) -> None:
        """Forget the consoles of a cluster that went down in order."""
        shutil.rmtree(self.logs, ignore_errors=True)

    def require_passable(self) -> None:
        """Raise Failed when QEMU's own user could not reach the folder."""
        parent = self.path.parent
        parent.mkdir(mode=PASSABLE, parents=True, exist_ok=True)
        if os.geteuid() != 0:
            return
        for folder in parent.absolute().parents:
            if not folder.stat().st_mode & 0o001:
                raise Failed(
                    f"QEMU, which runs as a user of its own, cannot pass through {folder}",
                    details=f"the nodes' disks would lie under {parent}",
                    remedy=f"chmod o+x {folder}, or name another folder with --state",
                )


def read_clusters(state: Path) -> Mapping[str, ClusterFolder]:
    """Every cluster that has a folder, by name."""
    parent = state / "clusters"
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    except (FileNotFoundError, PermissionError):
        return {}
    return {name: ClusterFolder(state, name) for name in names if _NAME.fullmatch(name)}
