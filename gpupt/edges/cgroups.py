"""Reads from a process's cgroup which systemd unit and which container it belongs to."""

from __future__ import annotations

import re
from typing import NamedTuple

# What the runtimes begin the name of a container's cgroup with.
SCOPES = {
    "docker": "docker",
    "libpod": "podman",
    "libpod-payload": "podman",
    "nerdctl": "nerdctl",
    "crio": "cri-o",
    "cri-containerd": "containerd",
}
SCOPE = re.compile(r"(?:.*:)?(?P<kind>[a-z-]+?)[-:](?P<id>[0-9a-f]{64})(?:\.scope)?")
HEX64 = re.compile(r"[0-9a-f]{64}")
# The pod's uid; that of a static pod is a hash.
POD = re.compile(
    r"(?:.*-)?pod(?P<uid>[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?![0-9a-f])"
)
# virDomainDriverGenerateMachineName in libvirt's src/hypervisor/domain_driver.c
MACHINE = re.compile(r"(?P<driver>qemu|lxc)-(?:embed-[0-9a-f]{8}-)?(?:\d+-)?(?P<name>.+)")
USER = re.compile(r"user@([0-9]{1,10})\.service")
ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


class Place(NamedTuple):
    """Where a process belongs, in the fields of Holder."""

    unit: str | None = None
    user: int | None = None
    runtime: str | None = None
    container: str | None = None
    pod: str | None = None


def place_of(cgroup: str) -> Place:
    """What a /proc/PID/cgroup says, of cgroup v1, v2 or both.

    The outermost container is the one that this machine's own runtime knows.
    """
    paths = {}
    for line in cgroup.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths[controllers] = path.removesuffix(" (deleted)").split("/")
    # systemd's own hierarchy, where there are several.
    own = paths.get("name=systemd") or paths.get("") or []
    runtime, container, pod = next(
        (told for path in [own, *paths.values()] if (told := container_in(path))),
        (None, None, None),
    )
    return Place(*unit_in(own), runtime, container, pod)


def unit_in(path: list[str]) -> tuple[str | None, int | None]:
    """The unit that a cgroup path runs through, and the user whose manager has it."""
    user = None
    for part in path:
        name = part.removeprefix("_")
        if user is None and (told := USER.fullmatch(name)):
            user = int(told[1])
        elif name.endswith((".service", ".scope")):
            return (name, user)
    return (None, None) if user is None else (f"user@{user}.service", None)


def container_in(path: list[str]) -> tuple[str, str, str | None] | None:
    """The outermost container of a cgroup path: its runtime, its id or name, its pod's uid."""
    pod = None
    for before, part in zip(["", *path], path, strict=False):
        if told := POD.match(part):
            pod = told["uid"].replace("_", "-")
        if (told := SCOPE.fullmatch(part)) and told["kind"] in SCOPES:
            return (SCOPES[told["kind"]], told["id"][:12], pod)
        if HEX64.fullmatch(part) and (before == "docker" or pod is not None):
            return ("docker" if before == "docker" else "kubernetes", part[:12], pod)
        if part.startswith("lxc.payload.") or (before == "lxc" and part):
            return ("lxc", part.removeprefix("lxc.payload."), None)
        if machine := machine_in(part):
            return (*machine, None)
    return None


def machine_in(part: str) -> tuple[str, str] | None:
    """The machine that a cgroup is, as systemd or libvirt names it: its runtime and name."""
    name = ESCAPED.sub(lambda found: chr(int(found[1], 16)), part)
    if name.startswith("systemd-nspawn@") and name.endswith(".service"):
        return ("machine", name[len("systemd-nspawn@") : -len(".service")])
    if name.startswith("machine-") and name.endswith(".scope"):
        name = name[len("machine-") : -len(".scope")]
        told = MACHINE.fullmatch(name)
    elif name.endswith((".libvirt-qemu", ".libvirt-lxc")):
        told = MACHINE.fullmatch(name.rpartition(".")[0])
    else:
        return None
    if told is None:
        return ("machine", name)
    return ("guest" if told["driver"] == "qemu" else "libvirt-lxc", told["name"])
