"""What holds of every tree, however strange: no crash, no way out of it, no harm planned.

Trees are machines with a disk, an uplink and some cards, on which things go wrong: what is
missing, garbage, a pipe, a folder where a file should be, a link that leads nowhere, round
in a circle, or out of the tree.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from fakekernel import FakeKernel, Function, modalias, plant
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from machines import with_disk, with_uplink

import gpupt
from gpupt.actions import BindFunction, Ledger, RecordLoan
from gpupt.decide.binding import choose_all, plan_attach, plan_detach
from gpupt.decide.doctor import diagnose
from gpupt.decide.viability import Preflight
from gpupt.edges import codec
from gpupt.edges.hostfacts import read_facts
from gpupt.edges.kernel import Kernel
from gpupt.edges.pciids import with_names
from gpupt.edges.routes import read_routes
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.errors import BadInput, GpuptError
from gpupt.model.host import Loan, Records
from gpupt.model.pci import PciAddress
from gpupt.report.hostjson import doctor_json, list_json, status_json
from gpupt.report.tables import gpu_table, status_lines

# The same examples every time: what fails here fails for everybody.
FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# What stands outside of the tree, and must never be read.
SECRET = "5ec4e7"
# Where modules are imported from, wherever the checkout lies.
CODE = tuple(
    os.path.realpath(folder)
    for folder in (Path(gpupt.__file__).parent, sys.prefix, sysconfig.get_path("stdlib"))
)


# --- addresses -----------------------------------------------------------------------------

HEX = "0123456789abcdefABCDEF"
NEAR = st.text(alphabet=f"{HEX}:.- x\n\u0660\uff11gG\0", max_size=16)
PARTS = st.tuples(
    st.integers(0, 0xFFFFFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7)
)


@settings(FIXED, max_examples=400)
@given(st.one_of(NEAR, st.text(max_size=24), st.from_regex(r"[0-9a-f:]{0,14}\.[0-9]\s?")))
def test_text_is_an_address_of_the_kernels_or_bad_input(text: str) -> None:
    try:
        address = PciAddress.parse(text)
    except BadInput as error:
        assert error.remedy
        return
    assert text.strip().isascii()
    assert 0 <= address.domain < 1 << 32
    assert 0 <= address.bus < 256
    assert 0 <= address.device < 32
    assert 0 <= address.function < 8
    assert PciAddress.parse(str(address)) == address


@settings(FIXED, max_examples=200)
@given(PARTS, PARTS)
def test_short_and_long_forms_are_one_address_and_order_as_numbers(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int]
) -> None:
    here, there = PciAddress(*one), PciAddress(*other)
    text = str(here)
    assert PciAddress.parse(text.upper()) == here
    assert PciAddress.parse(f" {text}\n") == here
    if here.domain == 0:
        assert PciAddress.parse(text.removeprefix("0000:")) == here
    assert (here < there) == (one < other)
    assert (str(here) == str(there)) == (one == other)


# --- trees ---------------------------------------------------------------------------------

GARBAGE = st.one_of(
    st.binary(max_size=24),
    st.sampled_from(
        [
            b"",
            b"\n",
            b"\xff\xfe\x80",
            b"-1",
            b"1",
            b"0x" + b"f" * 400,
            b"9" * 5000,
            b"nan GT/s",
            b"1e999 GT/s",
            "²".encode(),
            "٣".encode(),
            b"a\0b",
            b"(null)",
            b"vfio-pci",
            b"0 0 0\n" * 40,
            b"PCI_CLASS=\nPCI_ID=:\n",
            b"PCI_ID=10DE\xff:1\n",
            b"\x1b[31mred",
            b"22 1 254:1 / / rw - ext4 /dev/a\0b rw\n22 1 a\0:1 / /x rw - ext4 /dev/.. rw\n",
            b"22 1 ../..:1 / / rw - ext4 /dev/ rw\n",
        ]
    ),
)
ATTRIBUTES = (
    "vendor", "device", "class", "subsystem_vendor", "revision", "numa_node",
    "boot_vga", "driver_override", "resource", "reset_method", "d3cold_allowed", "power_state",
    "current_link_width", "current_link_speed", "max_link_speed", "sriov_numvfs", "config",
    "modalias", "driver", "iommu_group", "physfn", "drm", "sound", "vfio-dev",
)  # fmt: skip
OTHER_FILES = (
    "proc/cmdline", "proc/swaps", "proc/interrupts", "proc/iomem", "proc/fb", "proc/meminfo",
    "proc/self/limits", "proc/self/status", "proc/net/ipv6_route", "proc/sys/kernel/osrelease",
    "proc/77/stat", "proc/77/comm", "proc/77/fd", "proc/77/stack", "proc/\u00b2",
    "sys/kernel/iommu_groups/1/type", "sys/kernel/iommu_groups/1/reserved_regions",
    "sys/kernel/iommu_groups/1/devices", "sys/class/block/dm-0", "etc/modprobe.d/x.conf",
    "sys/devices/system/node/node0/hugepages/hugepages-4kB/nr_hugepages",
    "sys/devices/system/node/node\u00b2/hugepages", "sys/class/net/bond0",
    "sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "lib/modules/6/modules.alias",
    "proc/self/mountinfo", "sys/dev/block/254:1", "sys/class/block/vda1", "sys/class/net/eth0",
)  # fmt: skip
KINDS = st.sampled_from(
    ["garbage", "garbage", "garbage", "gone", "folder", "pipe", "nowhere", "circle", "outside"]
)


@dataclass(frozen=True)
class Damage:
    """What goes wrong at a path of the tree."""

    path: str
    kind: str
    bytes: bytes = b""

    def happen(self, root: Path, outside: Path) -> None:
        place = root / self.path
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_symlink() or not place.is_dir():
                place.unlink(missing_ok=True)
            elif self.kind != "folder":
                place.rename(place.with_name(f"{place.name}.away"))
        except OSError:
            # An earlier damage stands in the way.
            return
        if self.kind == "garbage":
            place.write_bytes(self.bytes)
        elif self.kind == "folder":
            place.mkdir(exist_ok=True)
        elif self.kind == "pipe":
            os.mkfifo(place)
        elif self.kind == "nowhere":
            # A link's text need not be UTF-8, nor lead anywhere.
            os.symlink(b"../../\xff\xfe" + self.bytes[:60].replace(b"\0", b"") + b"x", place)
        elif self.kind == "circle":
            place.symlink_to(place.name)
        elif self.kind == "outside":
            place.symlink_to(outside / place.name)


@dataclass(frozen=True)
class Tree:
    """A machine: its functions, the disk of / and the uplink among them, and its damages."""

    functions: tuple[Function, ...]
    disk: str
    uplink: str
    damages: tuple[Damage, ...]

    def plant(self, root: Path, outside: Path) -> None:
        plant(root, self.functions, drivers=["vfio-pci"])
        with_disk(root, self.disk)
        with_uplink(root, self.uplink)
        for damage in self.damages:
            damage.happen(root, outside)


def plant_outside(folder: Path) -> None:
    """What links out of a tree lead to: everything that is asked for, and all of it secret."""
    folder.mkdir()
    for name in (*ATTRIBUTES, *(path.rpartition("/")[2] for path in OTHER_FILES)):
        (folder / name).write_text(f"{SECRET}\n")


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    domain = draw(st.sampled_from(["0000", "0001", "10000", "ffffffff"]))
    slots = draw(st.lists(st.tuples(st.integers(0, 0xFF), st.integers(0, 0x1F)), min_size=3,
                          max_size=6, unique=True))  # fmt: skip
    groups = st.none() | st.integers(0, 2)
    functions = []
    for bus, slot in slots[2:]:
        for number in range(draw(st.integers(1, 2))):
            functions.append(
                Function(
                    f"{domain}:{bus:02x}:{slot:02x}.{number}",
                    draw(st.sampled_from(["10de:2330", "1002:74a1", "8086:0bd5"])),
                    draw(st.sampled_from([0x030000, 0x030200, 0x120000, 0x040300, 0x060400])),
                    draw(st.sampled_from([None, "nvidia", "vfio-pci", "pcieport"])),
                    group=draw(groups),
                    boot_vga=draw(st.sampled_from([None, 0, 0, 1])),
                    resets=draw(st.sampled_from([None, "flr bus"])),
                )
            )
    disk, uplink = (f"{domain}:{bus:02x}:{slot:02x}.0" for bus, slot in slots[:2])
    # The host's own devices are in groups, and often in that of a card.
    functions.append(Function(disk, "144d:a80a", 0x010802, "nvme", group=draw(st.integers(0, 2))))
    functions.append(Function(uplink, "8086:1592", 0x020000, "ice", group=draw(st.integers(0, 2))))
    return Tree(tuple(functions), disk, uplink, tuple(draw(damages(functions))))


@st.composite
def damages(draw: st.DrawFn, functions: list[Function]) -> list[Damage]:
    paths = st.one_of(
        st.tuples(st.sampled_from([f.address for f in functions]), st.sampled_from(ATTRIBUTES)).map(
            lambda found: f"sys/devices/pci0000:00/{found[0]}/{found[1]}"
        ),
        st.sampled_from(OTHER_FILES),
    )
    # The groups' own lists are true: they are what harm is told by.
    return draw(
        st.lists(
            st.builds(Damage, paths.filter(lambda p: not p.endswith("1/devices")), KINDS, GARBAGE),
            max_size=8,
        )
    )


@contextmanager
def planted(tree: Tree) -> Iterator[Path]:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gpupt-test-", dir=shared) as folder:
        plant_outside(Path(folder) / "outside")
        tree.plant(Path(folder) / "machine", Path(folder) / "outside")
        yield Path(folder) / "machine"


watched: list[str] | None = None
os_open = os.open


def note(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook (there is no way to take one out again): which paths are opened."""
    if watched is not None and event in {"open", "os.listdir", "os.scandir"}:
        path, flags = arguments[0], arguments[2] if event == "open" else 0
        assert isinstance(flags, int)
        # O_PATH looks where a link leads, and opens nothing; a name alone is opened_in's.
        if isinstance(path, str) and os.path.isabs(path) and not flags & os.O_PATH:
            watched.append(opened(path, flags))


sys.addaudithook(note)


def opened(path: str, flags: int) -> str:
    """The file that is opened by a path: O_NOFOLLOW opens no link."""
    folder, _, name = path.rpartition("/")
    if flags & os.O_NOFOLLOW:
        return f"{os.path.realpath(folder)}/{name}"
    return os.path.realpath(path)


def opened_in(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """os.open, which tells its audit hook of no ``dir_fd``: a name alone is looked up here."""
    if watched is not None and not os.path.isabs(path):
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        watched.append(opened(f"{folder}/{path}", flags))
    return os_open(path, flags, mode, dir_fd=dir_fd)


@contextmanager
def watching() -> Iterator[list[str]]:
    global watched
    watched = found = []
    try:
        with patch.object(os, "open", opened_in):
            yield found
    finally:
        watched = None


def read_everything(root: Path) -> str:
    """All that gpupt reads of a machine, and all that it says of it."""
    host = with_names(read_host(root, whole=True), root)
    facts = read_facts(root, host)
    diagnosis = diagnose(host, ledger=Ledger(), facts=facts)
    # Everything said is text and JSON that others can read.
    for data in (list_json(host, Records()), status_json(host, Ledger()), doctor_json(diagnosis)):
        json.dumps(data, allow_nan=False)
    lines = [*gpu_table(host, Records(), colour=False), *status_lines(host, Ledger(), colour=False)]
    "\n".join(lines).encode()
    read_routes(root)
    for gpu in host.gpus:
        origins = [action.origins for action in plan_of(host, gpu.address) if action]
        assert all(codec.decode(codec.encode(each)) == each for each in origins)
    return f"{host}{facts}{diagnosis}"


def plan_of(host, address):
    try:
        plan = plan_detach(host, gpus=[address], loans={}, preflight=Preflight(boot_gpu=True))
    except GpuptError:
        return []
    return [action for action in plan.actions if isinstance(action, RecordLoan)]


@settings(FIXED, max_examples=110)
@given(trees())
def test_no_tree_crashes_the_reader_or_leads_it_out(tree: Tree) -> None:
    with planted(tree) as root, watching() as opened:
        try:
            said = read_everything(root)
        except GpuptError as error:
            said = str(error)
        assert SECRET not in said
        # What cards are called is the running machine's to know, and modules are imported late.
        names = ("/usr/", "/var/lib/pciutils/")
        code = [f"{folder}/" for folder in CODE]
        allowed = (f"{os.path.realpath(root)}/", *names, *code)
        astray = [path for path in opened if not f"{path}/".startswith(allowed)]
        assert astray == []
        assert [path for path in opened if "/outside" in path] == []


@settings(FIXED, max_examples=200)
@given(trees(), st.booleans())
def test_no_tree_makes_a_plan_that_takes_what_the_host_needs(tree: Tree, boot_gpu: bool) -> None:
    needed = {f.address for f in tree.functions if f.address in {tree.disk, tree.uplink}}
    groups = {f.group for f in tree.functions if f.address in needed}
    protected = needed | {f.address for f in tree.functions if f.group in groups}
    display = {f.address for f in tree.functions if f.boot_vga == 1} - {
        # What says so is gone, or says no.
        damage.path.split("/")[3]
        for damage in tree.damages
        if damage.path.endswith("/boot_vga")
    }
    with planted(tree) as root:
        try:
            host = read_host(root, whole=True)
        except GpuptError:
            return
        preflight = Preflight(boot_gpu=boot_gpu)
        taken, _ = choose_all(host, loans={}, preflight=preflight)
        for chosen in [*([gpu.address] for gpu in host.gpus), list(taken)]:
            try:
                plan = plan_detach(host, gpus=chosen, loans={}, preflight=preflight)
            except GpuptError:
                continue
            moved = {str(a.address) for a in plan.actions if isinstance(a, BindFunction)}
            assert not moved & protected
            assert boot_gpu or not moved & display
            # And the way back moves what was taken, and no more.
            loans = {a.gpu: Loan(a.gpu, a.origins) for a in plan.actions if type(a) is RecordLoan}
            home = plan_attach(host, gpus=list(loans), loans=loans)
            assert (
                not {str(a.address) for a in home.actions if isinstance(a, BindFunction)}
                & protected
            )


# --- single cases, each found by the above or thought of beside it -------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    card = Function("0000:01:00.0", "10de:2330", 0x030200, "nvidia", group=1, resets="flr")
    disk = Function("0000:02:00.0", "144d:a80a", 0x010802, "nvme", group=2)
    uplink = Function("0000:03:00.0", "8086:1592", 0x020000, "ice", group=3)
    tree = Tree((card, disk, uplink), disk.address, uplink.address, ())
    plant_outside(tmp_path / "outside")
    tree.plant(tmp_path / "machine", tmp_path / "outside")
    return tmp_path / "machine"


def refusal(root: Path) -> str:
    host = read_host(root, whole=True)
    with pytest.raises(GpuptError) as error:
        plan_detach(host, gpus=[host.gpus[0].address], loans={}, preflight=Preflight())
    return str(error.value)


def regroup(root: Path, address: str, *, group: int) -> None:
    """Have the kernel list a function in another group too."""
    folder = root / f"sys/kernel/iommu_groups/{group}/devices"
    (folder / address).symlink_to(f"../../../../devices/pci0000:00/{address}")


def test_a_disk_whose_own_link_is_broken_keeps_its_group(machine: Path) -> None:
    regroup(machine, "0000:02:00.0", group=1)
    (machine / "sys/devices/pci0000:00/0000:02:00.0/iommu_group").unlink()
    assert "0000:02:00.0" in refusal(machine)


def test_a_member_that_cannot_be_read_keeps_its_group(machine: Path) -> None:
    regroup(machine, "0000:02:00.0", group=1)
    for name in ("modalias", "class"):
        (machine / f"sys/devices/pci0000:00/0000:02:00.0/{name}").write_bytes(b"\xff")
    assert "holds what could not be read" in refusal(machine)


def test_an_uplink_that_leads_nowhere_makes_every_network_card_critical(machine: Path) -> None:
    (machine / "sys/class/net/eth0").unlink()
    (why,) = {str(c.address): c.why for c in read_host(machine, whole=True).critical
              if str(c.address) == "0000:03:00.0"}.values()  # fmt: skip
    assert why == "the default route leaves by eth0, and this may be it"


def test_the_uplink_of_a_recorded_machine_is_the_one_it_had(machine: Path) -> None:
    """A recording has the interface in the function's folder of the bus itself."""
    other = machine / "sys/bus/pci/devices/0000:04:00.0"
    (other / "net/net0").mkdir(parents=True)
    (other / "modalias").write_text(modalias("8086:1592", 0x020000))
    (machine / "sys/class/net/eth0").unlink()
    (machine / "sys/class/net/eth0").symlink_to("../../bus/pci/devices/0000:04:00.0/net/net0")
    found = [str(each.address) for each in read_host(machine, whole=True).critical]
    assert found == ["0000:02:00.0", "0000:04:00.0"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "slaves/dm-0").symlink_to("../../dm-0"),
        lambda folder: (folder / "slaves/..").exists(),
    ],
)
def test_a_disk_that_is_made_of_itself(machine: Path, spoil: Callable[[Path], object]) -> None:
    folder = machine / "sys/devices/virtual/block/dm-0"
    (folder / "slaves").mkdir(parents=True)
    (machine / "sys/class/block/dm-0").symlink_to("../../devices/virtual/block/dm-0")
    spoil(folder)
    (machine / "proc/swaps").write_text("Filename\n/dev/dm-0 partition 1 0 -2\n")
    assert len(read_host(machine, whole=True).critical) == 2


def test_garbage_where_boot_vga_should_be_is_the_boot_display(machine: Path) -> None:
    (machine / "sys/devices/pci0000:00/0000:01:00.0/boot_vga").write_bytes(b"\xff")
    assert "boot display" in refusal(machine)


@pytest.mark.parametrize("name", ["lost+found", "1:00.0", "0000:01:00.0 ", "00000000:01:00.0"])
def test_a_name_that_the_kernel_never_gives_is_refused(machine: Path, name: str) -> None:
    (machine / "sys/bus/pci/devices" / name).symlink_to("../../../devices/pci0000:00/0000:01:00.0")
    with pytest.raises(BadInput):
        read_host(machine)


def test_a_function_that_leads_out_of_the_tree_is_refused(machine: Path) -> None:
    device = machine / "sys/bus/pci/devices/0000:01:00.0"
    device.unlink()
    device.symlink_to(machine.parent / "outside")
    with pytest.raises(BadInput, match="no function of this tree"):
        read_host(machine)


def test_nothing_is_written_through_a_link_that_leads_out(machine: Path) -> None:
    outside = machine.parent / "outside"
    before = {file.name: file.read_text() for file in outside.iterdir()}
    device = machine / "sys/bus/pci/devices/0000:01:00.0"
    device.unlink()
    device.symlink_to(outside)
    for kernel in (Kernel(machine), FakeKernel(machine, drivers={})):
        with pytest.raises(BadInput, match="leads out of"):
            kernel.set_override(PciAddress.parse("01:00.0"), "vfio-pci")
    assert {file.name: file.read_text() for file in outside.iterdir()} == before


def test_links_inside_of_the_tree_are_followed(machine: Path) -> None:
    folder = machine / "sys/devices/pci0000:00/0000:01:00.0"
    (folder / "resets").write_text("bus\n")
    (folder / "reset_method").unlink()
    (folder / "reset_method").symlink_to("resets")
    assert read_host(machine).gpus[0].device.reset_methods == ("bus",)
    # Also when the tree itself is reached by a link.
    (machine.parent / "by-link").symlink_to("machine")
    assert read_host(machine.parent / "by-link") == read_host(machine)


def test_a_pipe_in_the_tree_is_not_waited_for(machine: Path) -> None:
    os.mkfifo(machine / "proc/iomem")
    assert Reader(machine).whole("proc/iomem") == ""
    assert Reader(machine).text("proc/iomem") == ""


def test_speeds_that_are_no_numbers_are_none(machine: Path) -> None:
    for text in ("nan GT/s", "inf GT/s", "1e999 GT/s"):
        (machine / "sys/devices/pci0000:00/0000:01:00.0/current_link_speed").write_text(text)
        assert read_host(machine).gpus[0].device.link.speed is None
