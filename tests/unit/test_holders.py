"""A holder of a GPU is named by PID, unit and container, with what makes it let go."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakekernel import Function, plant

from gpupt.actions import Ledger
from gpupt.decide.doctor_cards import device_held
from gpupt.decide.holding import holder_line, way_to_stop
from gpupt.decide.viability import Preflight, assess_lending
from gpupt.edges.cgroups import Place, place_of
from gpupt.edges.holders import mapped_nodes, open_nodes, read_holders, read_place
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.model.facts import HostFacts
from gpupt.model.host import Holder, Host, Severity
from gpupt.model.pci import DriverBinding, PciAddress

GPU = PciAddress.parse("0000:01:00.0")
ID = "3f4b1c2d9e8a7065" * 4
SHORT = ID[:12]
OTHER = "00112233445566778899aabbccddeeff" * 2
UID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
UID_ = UID.replace("-", "_")
# A static pod's uid is a hash of its manifest.
HASH = "b9e1f0a2c3d4e5f60718293a4b5c6d7e"


def of_all_controllers(path: str, *, unified: str | None = None) -> str:
    """A /proc/PID/cgroup of cgroup v1, with the unified hierarchy beside it where there is one."""
    names = ("devices", "cpu,cpuacct", "pids", "name=systemd")
    lines = [f"{12 - number}:{name}:{path}" for number, name in enumerate(names)]
    return "\n".join([*lines, *([f"0::{unified}"] if unified is not None else [])]) + "\n"


PLACES = {
    "nothing": ("", Place()),
    "the root of all": ("0::/\n", Place()),
    "what is not to be read": ("garbage\n::\n1:\n\0:a:\ufffd", Place()),
    "a service": ("0::/system.slice/ollama.service\n", Place("ollama.service")),
    "a service, v1": (of_all_controllers("/system.slice/ollama.service"), Place("ollama.service")),
    "a service, both": (
        of_all_controllers("/system.slice/slurmd.service", unified="/system.slice/x.service"),
        Place("slurmd.service"),
    ),
    "a service of a template in a slice of its own": (
        "0::/system.slice/system-jupyter.slice/jupyter@ann\\x2dlee.service\n",
        Place("jupyter@ann\\x2dlee.service"),
    ),
    "a part of a service": (
        "0::/system.slice/nvidia-dcgm.service/worker/7\n",
        Place("nvidia-dcgm.service"),
    ),
    "a user's application": (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-blender-77.scope\n",
        Place("app-blender-77.scope", 1000),
    ),
    "a user's desktop": (
        "0::/user.slice/user-1000.slice/user@1000.service/session.slice/"
        "org.gnome.Shell@wayland.service\n",
        Place("org.gnome.Shell@wayland.service", 1000),
    ),
    "a user's login": (
        "0::/user.slice/user-1000.slice/session-3.scope\n",
        Place("session-3.scope"),
    ),
    "a user's manager": (
        "0::/user.slice/user-1000.slice/user@1000.service\n",
        Place("user@1000.service"),
    ),
    "docker": (
        f"0::/system.slice/docker-{ID}.scope\n",
        Place(f"docker-{ID}.scope", None, "docker", SHORT),
    ),
    "docker whose group is gone": (
        f"0::/system.slice/docker-{ID}.scope (deleted)\n",
        Place(f"docker-{ID}.scope", None, "docker", SHORT),
    ),
    "docker by cgroupfs": (f"0::/docker/{ID}\n", Place(None, None, "docker", SHORT)),
    "docker by cgroupfs, v1": (
        of_all_controllers(f"/docker/{ID}", unified="/system.slice/containerd.service"),
        Place(None, None, "docker", SHORT),
    ),
    "docker where systemd's own hierarchy does not tell": (
        f"11:devices:/docker/{ID}\n1:name=systemd:/system.slice/docker.service\n",
        Place("docker.service", None, "docker", SHORT),
    ),
    "docker in docker": (f"0::/docker/{ID}/docker/{OTHER}\n", Place(None, None, "docker", SHORT)),
    "kubernetes in docker": (
        f"0::/docker/{ID}/kubelet/kubepods/besteffort/pod{UID}/{OTHER}\n",
        Place(None, None, "docker", SHORT),
    ),
    "docker of a user": (
        f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope\n",
        Place(f"docker-{ID}.scope", 1000, "docker", SHORT),
    ),
    "podman": (
        f"0::/machine.slice/libpod-{ID}.scope/container\n",
        Place(f"libpod-{ID}.scope", None, "podman", SHORT),
    ),
    "podman of a user": (
        f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope\n",
        Place(f"libpod-{ID}.scope", 1000, "podman", SHORT),
    ),
    "podman in a unit of its own": (
        f"0::/system.slice/train.service/libpod-payload-{ID}\n",
        Place("train.service", None, "podman", SHORT),
    ),
    "podman's monitor, which is no container": (
        f"0::/machine.slice/libpod-conmon-{ID}.scope\n",
        Place(f"libpod-conmon-{ID}.scope"),
    ),
    "nerdctl": (
        f"0::/system.slice/nerdctl-{ID}.scope\n",
        Place(f"nerdctl-{ID}.scope", None, "nerdctl", SHORT),
    ),
    "containerd for kubernetes": (
        "0::/kubepods.slice/kubepods-burstable.slice/"
        f"kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope\n",
        Place(f"cri-containerd-{ID}.scope", None, "containerd", SHORT, UID),
    ),
    "containerd told the other driver": (
        "0::/system.slice/containerd.service/"
        f"kubepods-besteffort-pod{UID_}.slice:cri-containerd:{ID}\n",
        Place("containerd.service", None, "containerd", SHORT, UID),
    ),
    "cri-o": (
        f"0::/kubepods.slice/kubepods-pod{UID_}.slice/crio-{ID}.scope/container\n",
        Place(f"crio-{ID}.scope", None, "cri-o", SHORT, UID),
    ),
    "cri-o's monitor": (
        f"0::/system.slice/crio-conmon-{ID}.scope\n",
        Place(f"crio-conmon-{ID}.scope"),
    ),
    "kubernetes by cgroupfs": (
        of_all_controllers(f"/kubepods/burstable/pod{UID}/{ID}"),
        Place(None, None, "kubernetes", SHORT, UID),
    ),
    "a static pod": (
        f"0::/kubepods.slice/kubepods-pod{HASH}.slice/cri-containerd-{ID}.scope\n",
        Place(f"cri-containerd-{ID}.scope", None, "containerd", SHORT, HASH),
    ),
    "lxc": ("0::/lxc.payload.web/system.slice/x.service\n", Place("x.service", None, "lxc", "web")),
    "lxc, v1": (of_all_controllers("/lxc/101/ns"), Place(None, None, "lxc", "101")),
    "lxc's monitor": ("0::/lxc.monitor.web\n", Place()),
    "nspawn": (
        "0::/machine.slice/systemd-nspawn@my\\x2dbox.service/payload/init.scope\n",
        Place("systemd-nspawn@my\\x2dbox.service", None, "machine", "my-box"),
    ),
    "a machine": (
        "0::/machine.slice/machine-deb13.scope/payload\n",
        Place("machine-deb13.scope", None, "machine", "deb13"),
    ),
    "a guest of libvirt": (
        "0::/machine.slice/machine-qemu\\x2d3\\x2dlab\\x2dnode1.scope/libvirt/emulator\n",
        Place("machine-qemu\\x2d3\\x2dlab\\x2dnode1.scope", None, "guest", "lab-node1"),
    ),
    "a guest of an embedded libvirt": (
        "0::/machine.slice/machine-qemu\\x2dembed\\x2d0badc0de\\x2d3\\x2dnode1.scope\n",
        Place("machine-qemu\\x2dembed\\x2d0badc0de\\x2d3\\x2dnode1.scope", None, "guest", "node1"),
    ),
    "a guest without systemd, v1": (
        of_all_controllers("/machine/qemu-3-node1.libvirt-qemu/emulator"),
        Place(None, None, "guest", "node1"),
    ),
    "a container of libvirt": (
        "0::/machine.slice/machine-lxc\\x2d1234\\x2dweb.scope\n",
        Place("machine-lxc\\x2d1234\\x2dweb.scope", None, "libvirt-lxc", "web"),
    ),
}


@pytest.mark.parametrize("form", PLACES)
def test_the_cgroup_tells_unit_and_container(form: str) -> None:
    text, place = PLACES[form]
    assert place_of(text) == place


PLAIN = Holder(4242, "python3", "/dev/nvidia0")
SAID = [
    (PLAIN, "PID 4242 (python3) has /dev/nvidia0 open", "kill 4242"),
    (
        replace(PLAIN, mapped=True),
        "PID 4242 (python3) has /dev/nvidia0 mapped",
        "kill 4242",
    ),
    (
        replace(PLAIN, unit="ollama.service"),
        "PID 4242 (python3) in ollama.service has /dev/nvidia0 open",
        "systemctl stop ollama.service",
    ),
    (
        replace(PLAIN, unit="a\\x2db.service"),
        "PID 4242 (python3) in a\\x2db.service has /dev/nvidia0 open",
        "systemctl stop 'a\\x2db.service'",
    ),
    (
        replace(PLAIN, unit="app-blender-77.scope", user=1000),
        "PID 4242 (python3) in app-blender-77.scope of user 1000 has /dev/nvidia0 open",
        "systemctl --user -M 1000@.host stop app-blender-77.scope",
    ),
    # Nobody is logged out for it.
    (
        replace(PLAIN, unit="session-3.scope"),
        "PID 4242 (python3) in session-3.scope has /dev/nvidia0 open",
        "kill 4242",
    ),
    (
        replace(PLAIN, unit="user@1000.service"),
        "PID 4242 (python3) in user@1000.service has /dev/nvidia0 open",
        "kill 4242",
    ),
    (
        replace(PLAIN, unit=f"docker-{ID}.scope", runtime="docker", container=SHORT),
        f"PID 4242 (python3) in docker container {SHORT} has /dev/nvidia0 open",
        f"docker stop {SHORT}",
    ),
    (
        replace(PLAIN, user=1000, runtime="podman", container=SHORT),
        f"PID 4242 (python3) in podman container {SHORT} of user 1000 has /dev/nvidia0 open",
        f"podman stop {SHORT} as user 1000",
    ),
    (
        replace(PLAIN, runtime="nerdctl", container=SHORT),
        f"PID 4242 (python3) in nerdctl container {SHORT} has /dev/nvidia0 open",
        f"nerdctl stop {SHORT}",
    ),
    (
        replace(PLAIN, runtime="containerd", container=SHORT, pod=UID),
        f"PID 4242 (python3) in containerd container {SHORT} of pod {UID} has /dev/nvidia0 open",
        f"crictl pods --label io.kubernetes.pod.uid={UID} names the pod; "
        "then kubectl delete pod, or kubectl drain this machine",
    ),
    (
        replace(PLAIN, runtime="kubernetes", container=SHORT, pod=UID),
        f"PID 4242 (python3) in container {SHORT} of pod {UID} has /dev/nvidia0 open",
        f"crictl pods --label io.kubernetes.pod.uid={UID} names the pod; "
        "then kubectl delete pod, or kubectl drain this machine",
    ),
    (
        replace(PLAIN, runtime="cri-o", container=SHORT),
        f"PID 4242 (python3) in cri-o container {SHORT} has /dev/nvidia0 open",
        f"crictl stop {SHORT}",
    ),
    (
        replace(PLAIN, runtime="guest", container="lab-node1"),
        "PID 4242 (python3) in guest lab-node1 has /dev/nvidia0 open",
        "virsh shutdown lab-node1 (gpupt down CLUSTER for a cluster's node)",
    ),
    (
        replace(PLAIN, runtime="libvirt-lxc", container="web"),
        "PID 4242 (python3) in libvirt container web has /dev/nvidia0 open",
        "virsh -c lxc:///system shutdown web",
    ),
    (
        replace(PLAIN, runtime="lxc", container="we b"),
        "PID 4242 (python3) in lxc container we b has /dev/nvidia0 open",
        "lxc-stop -n 'we b' (Incus: incus stop 'we b')",
    ),
    (
        replace(PLAIN, runtime="machine", container="deb13"),
        "PID 4242 (python3) in machine deb13 has /dev/nvidia0 open",
        "machinectl poweroff deb13",
    ),
]


@pytest.mark.parametrize(("holder", "line", "way"), SAID)
def test_a_holder_is_named_and_the_way_to_stop_it(holder: Holder, line: str, way: str) -> None:
    assert (holder_line(holder), way_to_stop(holder)) == (line, way)


# --- a machine of processes ----------------------------------------------------------------


def machine(root: Path, driver: str = "nvidia") -> Host:
    """A machine with one GPU, /dev/nvidia0 or VFIO's group 1."""
    card = Function(str(GPU), "10de:2330", 0x030200, driver, group=1)
    plant(root, [card], drivers=["nvidia", "vfio-pci"])
    write(root / f"proc/driver/nvidia/gpus/{GPU}/information", "Device Minor: \t 0\n")
    return read_host(root)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def process(root: Path, pid: int, *nodes: str, maps: str = "", cgroup: str = "") -> None:
    """A process of the tree with these nodes open."""
    folder = root / f"proc/{pid}"
    write(folder / "comm", "python3\n")
    write(folder / "maps", maps)
    write(folder / "cgroup", cgroup)
    (folder / "fd").mkdir()
    for number, node in enumerate(nodes):
        (folder / f"fd/{number}").symlink_to(node)


def mapping(path: str) -> str:
    return (
        "55d0c0a00000-55d0c0a28000 r--p 00000000 fe:00 1836        /usr/bin/python3.11\n"
        f"7f2a4c000000-7f2a4c001000 rw-s 00000000 00:05 571         {path}\n"
        "7ffc8e9d2000-7ffc8e9f3000 rw-p 00000000 00:00 0           [stack]\n"
        "7f2a4d000000-7f2a4d001000 rw-p 00000000 00:00 0\n"
    )


def held(root: Path, host: Host, *, whole: bool = False) -> list[Holder]:
    return list(read_holders(Reader(root), host, [GPU], whole=whole).get(GPU, ()))


def test_unit_and_container_are_read_of_holders(tmp_path: Path) -> None:
    host = machine(tmp_path)
    process(tmp_path, 7, "/dev/nvidia0", cgroup=f"0::/system.slice/docker-{ID}.scope\n")
    process(tmp_path, 8, "/dev/nvidia1", cgroup="0::/system.slice/ollama.service\n")
    unit = f"docker-{ID}.scope"
    assert held(tmp_path, host) == [
        Holder(7, "python3", "/dev/nvidia0", unit=unit, runtime="docker", container=SHORT)
    ]


def test_a_node_that_was_unlinked_is_held_still(tmp_path: Path) -> None:
    host = machine(tmp_path)
    process(tmp_path, 7, "/dev/nvidia0 (deleted)")
    assert [holder.pid for holder in held(tmp_path, host)] == [7]


def test_the_domain_is_named_as_libvirt_names_it(tmp_path: Path) -> None:
    host = machine(tmp_path, "vfio-pci")
    cgroup = "0::/machine.slice/machine-qemu\\x2d3\\x2dnode1.scope/libvirt\n"
    for pid, argv in ((7, "qemu\0-name\0guest=no_de,,1,debug-threads=on\0-S\0"), (8, "qemu\0-S\0")):
        process(tmp_path, pid, "/dev/vfio/1", cgroup=cgroup)
        write(tmp_path / f"proc/{pid}/cmdline", argv)
    found = held(tmp_path, host)
    assert [(holder.runtime, holder.container) for holder in found] == [
        ("guest", "no_de,1"),
        ("guest", "node1"),
    ]


@pytest.mark.parametrize(("override", "found"), [("vfio-pci", [7]), (None, [])])
def test_a_card_that_is_let_go_of_has_its_holder_still(
    tmp_path: Path, override: str | None, found: list[int]
) -> None:
    """The kernel takes the driver's link away, and then waits for the guest."""
    host = machine(tmp_path, "vfio-pci")
    process(tmp_path, 7, "/dev/vfio/1")
    left = replace(host.devices[GPU], binding=DriverBinding(None, override))
    host = replace(host, devices={GPU: left})
    assert [holder.pid for holder in held(tmp_path, host)] == found


@pytest.mark.parametrize(
    ("opened", "path", "whole", "found"),
    [
        ((), "/dev/nvidia0", True, ["/dev/nvidia0"]),
        ((), "/dev/nvidia0 (deleted)", True, ["/dev/nvidia0"]),
        # Every process is looked into only when asked; who has the driver's other nodes, always.
        ((), "/dev/nvidia0", False, []),
        (("/dev/nvidiactl",), "/dev/nvidia0", False, ["/dev/nvidia0"]),
        ((), "/dev/nvidia1", True, []),
        ((), "/dev/nvidia01", True, []),
        ((), "/home/ann/a /dev/nvidia0", True, []),
    ],
)
def test_who_only_maps_a_node(
    tmp_path: Path, opened: tuple[str, ...], path: str, whole: bool, found: list[str]
) -> None:
    host = machine(tmp_path)
    process(tmp_path, 7, *opened, maps=mapping(path))
    holders = held(tmp_path, host, whole=whole)
    assert [holder.node for holder in holders if holder.mapped] == found
    assert len(holders) == len(found)


def test_what_is_open_is_not_called_mapped(tmp_path: Path) -> None:
    host = machine(tmp_path)
    process(tmp_path, 7, "/dev/nvidia0", maps=mapping("/dev/nvidia0"))
    assert [holder.mapped for holder in held(tmp_path, host, whole=True)] == [False]


def test_a_process_that_ended_is_nobody(tmp_path: Path) -> None:
    host = machine(tmp_path)
    (tmp_path / "proc/7").mkdir()
    process(tmp_path, 8, "/dev/nvidia0")
    for name in ("comm", "cgroup", "maps"):
        (tmp_path / f"proc/8/{name}").unlink()
    assert held(tmp_path, host, whole=True) == [Holder(8, "?", "/dev/nvidia0")]


def test_names_cannot_move_the_cursor(tmp_path: Path) -> None:
    host = machine(tmp_path)
    process(tmp_path, 7, "/dev/nvidia0", cgroup="0::/lxc.payload.a\x1b[2Jb\n")
    write(tmp_path / "proc/7/comm", "x\x1b[31m\n")
    (found,) = held(tmp_path, host)
    assert (found.command, found.container) == ("x?[31m", "a?[2Jb")


@pytest.mark.parametrize(
    ("driver", "irqs", "whole", "kept"),
    [
        ("nvidia", ["54"], True, True),
        ("nvidia", [], True, False),
        ("nvidia", ["54"], False, False),
        ("nouveau", ["54"], True, False),
    ],
)
def test_nvidia_keeps_a_card_in_use_for_no_process(
    tmp_path: Path, driver: str, irqs: list[str], whole: bool, kept: bool
) -> None:
    host = machine(tmp_path, driver)
    for number in irqs:
        write(tmp_path / f"sys/bus/pci/devices/{GPU}/msi_irqs/{number}", "msi\n")
    assert held(tmp_path, host, whole=whole) == ([Holder(0, "nvidia", "")] if kept else [])
    process(tmp_path, 7, "/dev/nvidia0")
    assert 0 not in [holder.pid for holder in held(tmp_path, host, whole=whole)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every process")
def test_where_processes_may_not_be_looked_into_nobody_is_ruled_out(tmp_path: Path) -> None:
    host = machine(tmp_path)
    write(tmp_path / f"sys/bus/pci/devices/{GPU}/msi_irqs/54", "msi\n")
    process(tmp_path, 7)
    (tmp_path / "proc/7/fd").chmod(0)
    assert held(tmp_path, host, whole=True) == []


# --- this machine --------------------------------------------------------------------------

CHILD = """
import ctypes, mmap, sys
kept = open("/dev/null")
# Python's own mmap keeps a descriptor.
with open("/dev/zero", "rb") as zero:
    ctypes.CDLL(None).mmap(None, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, zero.fileno(), 0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_process_of_this_machine() -> None:
    reader = Reader(Path("/"))
    argv = [sys.executable, "-c", CHILD]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        opened = open_nodes(reader, child.pid)
        mapped = mapped_nodes(reader, child.pid)
        place = read_place(reader, child.pid)
        child.communicate()
    assert opened is not None
    assert "/dev/null" in opened
    assert "/dev/zero" not in opened
    assert "/dev/zero" in mapped
    assert place == place_of(Path("/proc/self/cgroup").read_text())
    assert open_nodes(reader, child.pid) is None
    assert mapped_nodes(reader, child.pid) == set()
    assert read_place(reader, child.pid) == Place()
    assert reader.denied == []


# --- what comes of it ----------------------------------------------------------------------


def test_detach_is_refused_with_the_way_to_stop_it(tmp_path: Path) -> None:
    host = machine(tmp_path)
    holder = replace(PLAIN, unit="ollama.service")
    (found,) = assess_lending(
        host, host.gpus[0], loans={}, preflight=Preflight(holders={GPU: (holder,)})
    )
    assert found.id == "device-held"
    assert found.evidence == ("PID 4242 (python3) in ollama.service has /dev/nvidia0 open",)
    assert found.remedy == "systemctl stop ollama.service"


def test_detach_is_not_refused_for_what_the_driver_keeps(tmp_path: Path) -> None:
    host = machine(tmp_path)
    preflight = Preflight(holders={GPU: (Holder(0, "nvidia", ""),)})
    assert assess_lending(host, host.gpus[0], loans={}, preflight=preflight) == ()


def test_doctor_names_each_way_once(tmp_path: Path) -> None:
    host = machine(tmp_path)
    service = replace(PLAIN, unit="ollama.service")
    facts = HostFacts(holders={GPU: (service, replace(service, pid=7), PLAIN)})
    (found,) = device_held(host, Ledger(), facts)
    assert found.severity is Severity.WARN
    assert len(found.evidence) == 3
    assert found.remedy == (
        "systemctl stop ollama.service; kill 4242; "
        f"then nvidia-smi -i {GPU} -pm 0 (persistence has no fd)"
    )


def test_doctor_tells_persistence_from_a_holder(tmp_path: Path) -> None:
    host = machine(tmp_path)
    (found,) = device_held(host, Ledger(), HostFacts(holders={GPU: (Holder(0, "nvidia", ""),)}))
    assert found.severity is Severity.INFO
    assert found.evidence == ("no process has it open, and nvidia keeps it in use all the same",)
    assert found.remedy == f"nvidia-smi -i {GPU} -pm 0 (persistence has no fd)"
    assert list(device_held(host, Ledger(), HostFacts())) == []
