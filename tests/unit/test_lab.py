"""The emulated host without booting one: its cards, its command line, its record."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from click.testing import CliRunner

from gpupt.cli.lab import default_memory, parse_memory
from gpupt.cli.main import cli
from gpupt.edges.process import spawn
from gpupt.errors import BadInput, DeadlineExceeded, Failed, Refused
from gpupt.lab import host, machine, topology, topologyfile
from gpupt.lab.emulator import build_disguises, find_emulator
from gpupt.lab.qmp import Qmp
from gpupt.lab.stall import StallWatch
from gpupt.model.pci import PciAddress
from gpupt.model.roll import Image

QEMU = shutil.which("qemu-system-x86_64")
CC = shutil.which("cc")
QEMU_IMG = shutil.which("qemu-img")


def image(digest: str, folder: str = "/images") -> Image:
    where = PurePosixPath(folder) / digest
    return Image(
        digest,
        ("base",),
        where / "disk.qcow2",
        "qcow2",
        1 << 30,
        where / "vmlinuz",
        where / "initrd",
    )


MACHINE = machine.Machine(
    name="lab",
    image=image("aaaa000011112222"),
    topology=topology.TOPOLOGIES["default"],
    cpus=2,
    memory=8 << 30,
    port=2222,
    accelerator="tcg",
    images=(image("bbbb000011112222"),),
)
ARGUMENTS = machine.qemu_arguments(MACHINE)


# Cards


def test_default_cards_are_where_they_are_said_to_be() -> None:
    functions = dict(topology.TOPOLOGIES["default"].functions())
    shown = {str(address): (str(f.id), f.device_class) for address, f in functions.items()}
    assert shown == {
        "0000:01:00.0": ("10de:2330", 0x0302),
        "0000:02:00.0": ("10de:1eb8", 0x0302),
        "0000:02:00.1": ("10de:10f8", 0x0403),
        "0000:03:00.0": ("10de:1cb6", 0x0300),
    }
    assert functions[PciAddress.parse("02:00.1")].driver == "snd_hda_intel"


def test_disguises_name_each_kind_of_card_once() -> None:
    entries = topology.disguises(topology.TOPOLOGIES["eight"]).split(";")
    assert entries == ["edu-10de-2330=edu:1234:11e8:10de:2330:302:10de:16c1"]


def test_each_card_has_a_root_port_of_its_own() -> None:
    words = topology.device_arguments(topology.TOPOLOGIES["default"])
    ports = [word for word in words if word.startswith("pcie-root-port")]
    assert len(ports) == 3
    assert len({port.partition("addr=")[2] for port in ports}) == 3
    assert "secondary-vga-10de-1eb8,bus=port1,addr=0.0,id=gpu1,multifunction=on" in words
    assert "intel-hda-10de-10f8,bus=port1,addr=0.1,id=gpu1.1" in words


def test_the_boot_card_gets_its_driver_first() -> None:
    lines = topology.driver_commands(topology.TOPOLOGIES["default"])
    told = [line for line in lines if "new_id" in line]
    assert told[0] == "echo 10de 1cb6 > /sys/bus/pci/drivers/bochs-drm/new_id"
    assert "modprobe snd_hda_intel" in lines
    assert not any("snd_hda_intel/new_id" in line for line in lines)


GOOD = """\
cards:
  - - {device: edu, id: "10de:2330", class: "0302", driver: uio_pci_generic}
  - - {device: secondary-vga, id: "10de:1eb8", class: "0300", subsystem: "10de:12a2"}
    - {device: intel-hda, id: "10de:10f8", class: "0403", driver: snd_hda_intel}
"""


def test_a_topology_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    read = topologyfile.find_topology(str(file))
    assert read.name == "mine"
    assert [len(card.functions) for card in read.cards] == [1, 2]
    assert read.cards[1].functions[0].driver is None
    assert str(read.cards[0].functions[0].subsystem) == "10de:2330"


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("device: edu", "device: edo", "'edo'"),
        ("10de:2330", "10de2330", "'10de2330'"),
        ('"0302"', '"30200"', "'30200'"),
        ("driver: uio_pci_generic", "driver: nvidia", "'nvidia'"),
        ("driver: uio_pci_generic", "drivr: uio_pci_generic", "unknown key 'drivr'"),
        ("device: edu, ", "", "key 'device' is missing"),
    ],
)
def test_a_wrong_topology_is_told_with_its_place(
    tmp_path: Path, was: str, now: str, said: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(was, now, 1))
    with pytest.raises(BadInput) as caught:
        topologyfile.read_topology(file)
    assert said in str(caught.value)
    assert f"{file}:2:" in str(caught.value)


def test_more_cards_than_slots(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text("cards:\n" + '  - - {device: edu, id: "10de:2330", class: "0302"}\n' * 16)
    with pytest.raises(BadInput, match="16 cards"):
        topologyfile.read_topology(file)


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("shared", ["02:01.0", "02:02.0", "04:01.0", "04:02.0"]),
        ("numa", ["41:00.0", "81:00.0"]),
        ("no-iommu", ["01:00.0", "02:00.0", "02:00.1"]),
    ],
)
def test_cards_of_every_shape_are_where_they_are_said_to_be(
    name: str, addresses: list[str]
) -> None:
    shape = topology.TOPOLOGIES[name]
    assert [str(address)[5:] for address, _ in shape.functions()] == addresses


CROWDED = """\
iommu: no-intremap
cards:
  - - {device: edu, id: "10de:2330", class: "0302"}
  - {numa: 1, functions: [{device: igb, id: "10de:26b5", class: "0302", driver: pci-pf-stub}]}
  - {behind: a, functions: [{device: edu, id: "10de:2330", class: "0302"}]}
  - {behind: a, functions: [{device: disk}]}
  - {behind: a, numa: 0, functions: [{device: edu, id: "10de:2331", class: "0302"}]}
  - {numa: 1, behind: b, functions: [{device: edu, id: "10de:2332", class: "0302"}]}
"""


def read_text(folder: Path, text: str) -> topology.Topology:
    file = folder / "crowded.yaml"
    file.write_text(text)
    return topologyfile.read_topology(file)


def test_a_file_says_how_cards_hang(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    shape = read_text(tmp_path, CROWDED.replace("behind: a, numa: 0", "numa: 0"))
    assert shape.iommu is topology.Iommu.NO_INTREMAP
    assert shape.numa_nodes == 2
    placed = [f"{str(address)[5:]} {function.id}" for address, function in shape.functions()]
    assert placed == [
        *("01:00.0 10de:2330", "03:01.0 10de:2330", "03:02.0 1af4:1001"),
        *("41:00.0 10de:2331", "81:00.0 10de:26b5", "83:01.0 10de:2332"),
    ]
    crowded = replace(MACHINE, topology=shape, cpus=3, memory=(1 << 30) + (1 << 20))
    words = machine.qemu_arguments(crowded)
    golden("lab/crowded.txt", "\n".join([*words, topology.disguises(shape)]) + "\n")


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/lab.md").read_text()
    shape = read_text(tmp_path, page.partition("```yaml\n")[2].partition("```")[0])
    addresses = [str(address)[5:] for address, _ in shape.functions()]
    assert addresses == ["01:00.0", "02:00.0", "02:00.1", "04:01.0", "04:02.0", "81:00.0"]
    named = [line.split("`")[1::2] for line in page.splitlines() if line.startswith("| `")]
    assert set(topology.TOPOLOGIES) <= {name for names in named for name in names}


@pytest.mark.parametrize(
    ("was", "now", "said", "line"),
    [
        ("no-intremap", "maybe", "iommu is 'maybe'", 1),
        ("no-intremap", "yes", "iommu is 'yes'", 1),
        ("device: disk", "device: disk, driver: edu", "unknown key 'driver'", 6),
        ("behind: a", "behind: A", "behind of item 3 of cards is 'A'", 5),
        ("numa: 1", "numa: 3", "numa of item 2 of cards is 3", 4),
        ("numa: 1", "behind: c", "igb is behind a PCI bridge", 4),
        ("nothing", "", "cards behind 'a' are near to several nodes", 3),
    ],
)
def test_a_wrong_shape_is_told_with_its_place(
    tmp_path: Path, was: str, now: str, said: str, line: int
) -> None:
    with pytest.raises(BadInput) as caught:
        read_text(tmp_path, CROWDED.replace(was, now, 1))
    assert said in str(caught.value)
    assert f"crowded.yaml:{line}:" in str(caught.value)


@pytest.mark.parametrize("word", ["on", "off", '"off"', "no-intremap"])
def test_the_iommu_as_people_write_it(tmp_path: Path, word: str) -> None:
    shape = read_text(tmp_path, GOOD + f"iommu: {word}\n")
    assert shape.iommu.value == word.strip('"')


def test_an_iommu_that_is_off_is_not_there() -> None:
    off = replace(MACHINE, topology=topology.TOPOLOGIES["no-iommu"])
    assert not any("iommu" in word for word in machine.qemu_arguments(off) if "root=" not in word)
    assert any(word.startswith("intel-iommu,intremap=on") for word in ARGUMENTS)
    assert any(
        word.startswith("intel-iommu,intremap=off")
        for word in topology.iommu_arguments(topology.TOPOLOGIES["no-intremap"])
    )


def test_processors_and_memory_are_shared_among_nodes() -> None:
    numa = topology.TOPOLOGIES["numa"]
    two = topology.numa_arguments(numa, cpus=2, memory=3 << 30)
    assert two[1::2] == [
        "memory-backend-ram,id=node0,size=1536M",
        "node,nodeid=0,memdev=node0,cpus=0-0",
        "memory-backend-ram,id=node1,size=1536M",
        "node,nodeid=1,memdev=node1,cpus=1-1",
    ]
    one = topology.numa_arguments(numa, cpus=1, memory=1 << 30)
    assert [word for word in one if "cpus" in word] == ["node,nodeid=0,memdev=node0,cpus=0-0"]
    assert topology.numa_arguments(topology.TOPOLOGIES["one"], cpus=2, memory=1 << 30) == []


def test_an_unknown_topology() -> None:
    with pytest.raises(BadInput, match="'nine'"):
        topologyfile.find_topology("nine")


# QEMU's command line


def test_command_line_is_the_golden_one(golden: Callable[[str, str], None]) -> None:
    golden("lab/qemu.txt", "\n".join(machine.qemu_arguments(MACHINE)) + "\n")
    golden("lab/setup.sh", machine.setup_script(MACHINE))


def test_no_name_is_too_long_for_fw_cfg() -> None:
    words = machine.qemu_arguments(MACHINE)
    names = [w.partition("name=")[2].partition(",")[0] for w in words if w.startswith("name=opt/")]
    assert len(names) == 4
    assert all(len(name) <= 55 for name in names), "QEMU keeps 56 bytes for a name and its end"


def test_kvm_is_given_the_real_processor() -> None:
    words = machine.qemu_arguments(replace(MACHINE, accelerator="kvm"))
    assert words[words.index("-cpu") + 1] == "host"
    assert "kernel-irqchip=split" in words[words.index("-machine") + 1]
    assert "no_timer_check" not in machine.kernel_line(replace(MACHINE, accelerator="kvm"))


def test_a_share_is_mounted_for_writing() -> None:
    shared = replace(MACHINE, share=Path("/a,b"))
    assert any("path=/a,,b," in word for word in machine.qemu_arguments(shared))
    assert f"rw share {machine.SHARE}" in machine.setup_script(shared)
    assert machine.SHARE not in machine.setup_script(MACHINE)


# QEMU out of a baked tree


def make_tree(folder: Path, *parts: str) -> Path:
    for part in parts:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text("")
    return folder


def test_qemu_is_put_together_from_layers(tmp_path: Path) -> None:
    lower = make_tree(tmp_path / "base", "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    upper = make_tree(
        tmp_path / "host",
        "usr/bin/qemu-system-x86_64",
        "usr/lib/x86_64-linux-gnu/qemu/a.so",
        "usr/share/qemu/a",
        "usr/share/seabios/a",
    )
    found = find_emulator([upper, lower], preload=Path("/x.so"))
    libraries = f"{upper}/usr/lib/x86_64-linux-gnu:{lower}/usr/lib/x86_64-linux-gnu"
    assert found.argv[:5] == (
        f"{lower}/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        "--library-path",
        libraries,
        "--preload",
        "/x.so",
    )
    assert dict(found.environment) == {"QEMU_MODULE_DIR": f"{upper}/usr/lib/x86_64-linux-gnu/qemu"}


def test_the_emulator_roll_goes_before_debians_qemu(tmp_path: Path) -> None:
    libraries = "usr/lib/x86_64-linux-gnu"
    host = make_tree(
        tmp_path / "host",
        f"{libraries}/ld-linux-x86-64.so.2",
        f"{libraries}/qemu/a.so",
        "usr/bin/qemu-system-x86_64",
        "usr/share/qemu/a",
        "usr/share/seabios/a",
    )
    assert str(host / "usr/bin/qemu-system-x86_64") in find_emulator([host]).argv
    own = make_tree(tmp_path / "emulator", "opt/gpupt/emulator/qemu-system-x86_64")
    assert str(own / "opt/gpupt/emulator/qemu-system-x86_64") in find_emulator([own, host]).argv


def test_trees_without_qemu(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no /usr/bin/qemu-system-x86_64"):
        find_emulator([tmp_path])


@pytest.mark.skipif(CC is None or QEMU is None, reason="needs cc and qemu-system-x86_64")
def test_disguised_devices_are_known_to_qemu(tmp_path: Path) -> None:
    library = build_disguises(tmp_path)
    assert build_disguises(tmp_path) == library  # compiled once
    assert QEMU is not None
    done = subprocess.run(
        [QEMU, "-machine", "none", "-device", "edu-10de-2330,help"],
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "FAKE_PCI": topology.disguises(topology.TOPOLOGIES["default"]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dma_mask" in done.stdout


def devices_of_qemu() -> str:
    assert QEMU is not None
    argv = [QEMU, "-machine", "none", "-device", "help"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(CC is None or QEMU is None, reason="needs cc and qemu-system-x86_64")
@pytest.mark.parametrize("name", topology.TOPOLOGIES)
def test_qemu_takes_every_topology(tmp_path: Path, name: str) -> None:
    shape = topology.TOPOLOGIES[name]
    if any(f.stand_in == "igb" for _, f in shape.functions()) and '"igb"' not in devices_of_qemu():
        pytest.skip("this machine's QEMU has no igb (before 8.0)")
    assert QEMU is not None
    done = subprocess.run(
        [
            *(QEMU, "-machine", machine.MACHINE, "-nodefaults", "-display", "none", "-S"),
            *("-accel", "tcg", "-m", "256M", "-qmp", "stdio"),
            *topology.numa_arguments(shape, cpus=1, memory=256 << 20),
            *topology.iommu_arguments(shape),
            *topology.device_arguments(shape),
        ],
        env={
            **os.environ,
            "LD_PRELOAD": str(build_disguises(tmp_path)),
            "FAKE_PCI": topology.disguises(shape),
        },
        input='{"execute": "qmp_capabilities"}'
        ' {"execute": "qom-list", "arguments": {"path": "/machine/peripheral"}}'
        ' {"execute": "quit"}',
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for number in range(len(shape.cards)):
        assert f'"name": "gpu{number}"' in done.stdout


@pytest.mark.skipif(CC is None or QEMU is None, reason="needs cc and qemu-system-x86_64")
@pytest.mark.parametrize(
    ("disguise", "said"),
    [("nonsense", "cannot read"), ("x=edu:1:2:10de:2330:302:0:0", "edu is no 0001:0002")],
)
def test_a_wrong_disguise_ends_qemu(tmp_path: Path, disguise: str, said: str) -> None:
    assert QEMU is not None
    done = subprocess.run(
        [QEMU, "-machine", "none", "-device", "x,help"],
        env={**os.environ, "LD_PRELOAD": str(build_disguises(tmp_path)), "FAKE_PCI": disguise},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr


# Its record and its process


def record(state: Path, *, pid: int, started: str) -> host.Lab:
    folder = host.labs_folder(state) / "lab"
    folder.mkdir(parents=True)
    lab = host.Lab(
        name="lab",
        folder=folder,
        pid=pid,
        started=started,
        port=1,
        image="aaaa000011112222",
        accelerator="tcg",
        cpus=2,
        memory=8 << 30,
        topology="default",
        images=("bbbb000011112222",),
    )
    host.write_record(lab)
    return lab


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    me = host.process_identity(os.getpid())
    assert me is not None
    lab = record(tmp_path, pid=os.getpid(), started=me)
    assert host.find_lab(tmp_path, "lab") == lab
    assert host.need_lab(tmp_path, "lab").is_running
    assert host.read_labs(tmp_path) == (lab,)


def test_another_process_of_the_same_number_is_not_it(tmp_path: Path) -> None:
    lab = record(tmp_path, pid=os.getpid(), started="another boot/1")
    assert not lab.is_running
    with pytest.raises(Failed, match="is not up"):
        host.need_lab(tmp_path, "lab")


def test_a_process_that_ended_has_no_identity() -> None:
    child = spawn(["sleep", "60"])
    assert host.process_identity(child.pid) is not None
    child.kill()
    while Path(f"/proc/{child.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert host.process_identity(child.pid) is None, "a zombie has ended"
    child.wait()
    assert host.process_identity(child.pid) is None


def test_what_is_left_of_an_ended_host_is_removed(tmp_path: Path) -> None:
    lab = record(tmp_path, pid=os.getpid(), started="another boot/1")
    host.stop_lab(lab, narrate=lambda _: None)
    assert host.find_lab(tmp_path, "lab") is None
    assert not lab.folder.exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    lab = record(tmp_path, pid=os.getpid(), started="another boot/1")
    with host._only_one(lab.folder), pytest.raises(Refused, match="another gpupt"):
        host.stop_lab(lab, narrate=lambda _: None)


@pytest.mark.skipif(CC is None or QEMU_IMG is None, reason="needs cc and qemu-img")
def test_a_qemu_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path / "tree",
        "usr/bin/qemu-system-x86_64",
        "usr/lib/x86_64-linux-gnu/qemu/a.so",
        "usr/share/qemu/a",
        "usr/share/seabios/a",
    )
    loader = tree / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    loader.write_text("#!/bin/sh\necho no such accelerator >&2; exit 1\n")
    loader.chmod(0o755)
    folder = tmp_path / "images/aaaa000011112222"
    folder.mkdir(parents=True)
    for name in ("vmlinuz", "initrd"):
        (folder / name).write_text(name)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.qcow2", "1M"], check=True
    )
    boots = image("aaaa000011112222", str(tmp_path / "images"))
    with pytest.raises(Failed, match="has ended") as caught:
        host.start_lab(
            replace(MACHINE, image=boots, images=(boots,)),
            state=tmp_path,
            trees=(tree,),
            narrate=lambda _: None,
        )
    assert "no such accelerator" in str(caught.value)
    assert host.find_lab(tmp_path, "lab") is None
    kept = host.labs_folder(tmp_path) / "lab"
    assert (kept / machine.LOG).is_file()
    assert not (kept / machine.OVERLAY).exists()
    assert (kept / machine.KEY).stat().st_mode & 0o077 == 0
    shared = json.loads((kept / "images/aaaa000011112222/image.json").read_text())
    assert shared["disk"] == "/dev/disk/by-id/virtio-aaaa000011112222"
    assert shared["format"] == "raw"


def test_a_state_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "lab").write_text("in the way")
    with pytest.raises(Refused, match="cannot write below"):
        host.start_lab(MACHINE, state=tmp_path, trees=(), narrate=lambda _: None)


def test_a_port_that_accepts_and_is_silent_is_no_ssh_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(DeadlineExceeded, match="did not answer SSH"):
            host.await_banner(port, deadline=0.5, alive=lambda: None, name="lab", patience=0.2)


STALLED = """\
[   22.638873] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
[   22.640021] rcu: \t1-...!: (0 ticks this GP) idle=cd08/0/0x0 softirq=11/11 fqs=0
"""


def test_a_kernel_that_stalls_as_it_starts_is_reset_once(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    resets: list[str] = []
    told: list[str] = []
    watch = StallWatch(console, reset=lambda: resets.append("pressed"), narrate=told.append)
    watch()  # there is no console yet
    console.write_text("[    1.012345] EXT4-fs (vda): mounted\n" + STALLED[:60])
    watch()
    assert not resets
    with console.open("a") as more:
        more.write(STALLED[60:])
    watch()
    watch()
    assert resets == ["pressed"]
    assert "detected stalls on CPUs" in told[0]
    with console.open("a") as more:
        more.write(STALLED.replace("rcu_preempt detected", "rcu_sched self-detected"))
    with pytest.raises(Failed, match="stalls as it starts") as caught:
        watch()
    assert "softirq=11/11" in str(caught.value)
    assert resets == ["pressed"]


def test_a_watch_is_asked_while_a_connection_is_awaited(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def watch() -> None:
        raise Stop

    me = host.process_identity(os.getpid())
    assert me is not None
    with pytest.raises(Stop):
        record(tmp_path, pid=os.getpid(), started=me).connect(deadline=5, watch=watch)


# QMP


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[Qmp]:
    if QEMU is None:
        pytest.skip("no qemu-system-x86_64 on this machine")
    path = tmp_path / ("deep/" * 20) / "qmp.sock"  # longer than a socket's path may be
    path.parent.mkdir(parents=True)
    child = spawn(
        [
            *(QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S"),
            *("-qmp", "unix:qmp.sock,server=on,wait=off"),
        ],
        folder=path.parent,
    )
    try:
        end = time.monotonic() + 20
        while True:
            try:
                connected = Qmp.connect(path, deadline=5)
                break
            except Failed:
                assert time.monotonic() < end
                time.sleep(0.05)
        with connected:
            yield connected
    finally:
        child.kill()
        child.wait()


def test_qmp_answers(qmp: Qmp) -> None:
    assert qmp.command("query-status")["status"] == "prelaunch"


def test_qmp_tells_what_qemu_refuses(qmp: Qmp) -> None:
    with pytest.raises(Failed, match="refuses device_del") as caught:
        qmp.command("device_del", id="gpu9")
    assert "gpu9" in str(caught.value)


def test_qmp_keeps_events_that_come_in_between(qmp: Qmp) -> None:
    qmp.command("cont")
    assert qmp.command("query-status")["running"]
    assert qmp.wait_for("RESUME", deadline=5)["event"] == "RESUME"
    with pytest.raises(DeadlineExceeded):
        qmp.wait_for("POWERDOWN", deadline=0.2)


def test_qmp_tells_a_qemu_that_went_away(qmp: Qmp) -> None:
    qmp.command("quit")
    with pytest.raises(Failed, match="went away"):
        for _ in range(100):
            qmp.command("query-status")


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="does not answer"):
        Qmp.connect(tmp_path / "qmp.sock", deadline=1)


# The command line


@pytest.mark.parametrize(
    ("text", "size"),
    [("10G", 10 << 30), ("4096m", 4 << 30), ("10 GiB", 10 << 30), ("1.5GiB", 3 << 29)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is not a size") for text in ("", "G", "10", "-1G")),
        *((text, "unknown unit") for text in ("1.5G", "10T")),
        *((text, "is not the memory of a host") for text in ("100M", "0 GiB", "99999999G")),
    ],
)
def test_wrong_sizes(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse_memory(text)


def test_default_memory_is_bounded() -> None:
    assert 4 << 30 <= default_memory() <= 16 << 30


@pytest.mark.parametrize("name", ["", "-lab", "lab-", "La", "a_b", "a" * 33, "../lab", "läb"])
def test_names_that_no_host_can_have(name: str) -> None:
    with pytest.raises(BadInput):
        host.check_name(name)


def invoke(state: Path, *words: str) -> tuple[object, str]:
    done = CliRunner().invoke(cli, ["--state", str(state), "lab", *words])
    return done.exception or done.exit_code, done.output


def test_down_of_nothing_is_nothing_to_do(tmp_path: Path) -> None:
    assert invoke(tmp_path, "down") == (0, "lab: nothing to do, it is not up\n")


def test_a_second_up_is_nothing_to_do(tmp_path: Path) -> None:
    me = host.process_identity(os.getpid())
    record(tmp_path, pid=os.getpid(), started=me or "")
    status, said = invoke(tmp_path, "up")
    assert status == 0
    assert said.startswith("lab: nothing to do, it is up\n")


def test_run_and_shell_need_a_host_that_is_up(tmp_path: Path) -> None:
    for words in (("run", "--", "true"), ("shell",)):
        error, _ = invoke(tmp_path, *words)
        assert isinstance(error, Failed)
        assert error.remedy == "gpupt lab up"


def test_run_hands_the_command_to_ssh_word_by_word(tmp_path: Path) -> None:
    me = host.process_identity(os.getpid())
    record(tmp_path, pid=os.getpid(), started=me or "")
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nfor word; do last=$word; done; echo "$last"; exit 7\n')
    ssh.chmod(0o755)
    words = ["lab", "run", "gpupt", "list", "--json", "--root", "a b"]
    done = subprocess.run(
        [sys.executable, "-m", "gpupt.cli.main", "--state", str(tmp_path), *words],
        env={**os.environ, "PATH": f"{ssh.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "gpupt list --json --root 'a b'\n"), done.stderr


def test_list_as_json(tmp_path: Path) -> None:
    record(tmp_path, pid=os.getpid(), started="another boot/1")
    status, said = invoke(tmp_path, "list", "--json")
    assert status == 0
    labs = json.loads(said)["labs"]
    assert [(each["name"], each["running"], each["topology"]) for each in labs] == [
        ("lab", False, "default")
    ]


def test_help_tells_every_verb(tmp_path: Path) -> None:
    _, said = invoke(tmp_path, "--help")
    for verb in ("up", "run", "shell", "down", "list", "demo"):
        assert f"\n  {verb} " in said
