"""What went wrong in the systems before this one, a test each, named after it.

The first part is the list of what was seen when the gpupt roll of 2018 was run; the second is
of Rocks' pragma_boot and of the rolls and playbooks around it, as far as gpupt has that part.
"""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import json
import pkgutil
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from clusters import machine, two_gpus
from fakekernel import FakeKernel, Fault, Function, plant
from herbarium import metrics
from machines import emulated_host, laptop, server

import gpupt
from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.decide.allocation import allocate
from gpupt.decide.binding import plan_detach
from gpupt.decide.domain import Credential, view_domain, view_network
from gpupt.decide.viability import Preflight, closure
from gpupt.edges.hypervisor import membership_in
from gpupt.edges.journal import Journal
from gpupt.edges.specfile import parse_specfile
from gpupt.edges.sysfs import read_host
from gpupt.edges.templates import render_view
from gpupt.errors import BadInput, Failed, GpuptError
from gpupt.model.pci import DriverBinding, PciAddress
from gpupt.model.roll import Image

T4 = "10de:1eb8"


class Typed:
    """A machine at which gpupt is typed."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.settings = Settings(
            root=kernel.root, state=kernel.root / "var/lib/gpupt", kernel=lambda root: kernel
        )

    def __call__(self, *words: str) -> tuple[int, str]:
        """The exit status as the shell gets it, and stdout."""
        result = CliRunner().invoke(cli, words, obj=self.settings)
        if isinstance(result.exception, GpuptError):
            return result.exception.exit_code, result.stdout
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout

    def gpus(self) -> dict[str, dict[str, Any]]:
        status, said = self("list", "--json")
        assert status == 0
        return {gpu["address"]: gpu for gpu in json.loads(said)["gpus"]}


def machine_of(root: Path, *functions: Function) -> Typed:
    plant(root, functions, drivers=["vfio-pci", "pci-stub", "nvidia", "nouveau"])
    (root / "proc/self").mkdir()
    (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - overlay overlay rw\n")
    return Typed(FakeKernel(root, drivers={"nouveau": [T4], "nvidia": [T4], "vfio-pci": []}))


# --- the gpupt roll ------------------------------------------------------------------------


def test_vfio_pci_reported_as_pci_stub_and_driverless_as_nvidia(tmp_path: Path) -> None:
    drivers = ("vfio-pci", "pci-stub", None, "nvidia", "nouveau")
    gpus = machine_of(
        tmp_path,
        *(
            Function(f"0000:0{number}:00.0", T4, 0x030200, driver, group=number)
            for number, driver in enumerate(drivers, 1)
        ),
    ).gpus()
    assert [gpu["driver"] for gpu in gpus.values()] == list(drivers)
    states = [gpu["state"] for gpu in gpus.values()]
    assert states == ["detached", "host", "driverless", "host", "host"]


def test_detach_of_a_card_on_nouveau_said_already_detached_and_did_nothing(tmp_path: Path) -> None:
    typed = machine_of(tmp_path, Function("0000:01:00.0", T4, 0x030200, "nouveau", group=1))
    assert typed("detach", "01:00.0", "--yes")[0] == 0
    assert typed.kernel.binding(PciAddress.parse("01:00.0")).driver == "vfio-pci"
    assert typed("attach", "01:00.0", "--yes")[0] == 0
    assert typed.kernel.binding(PciAddress.parse("01:00.0")) == DriverBinding("nouveau", None)


def test_attach_crashed_on_a_card_with_no_audio_function(tmp_path: Path) -> None:
    typed = machine_of(tmp_path, Function("0000:01:00.0", T4, 0x030200, "nvidia", group=1))
    before = typed.kernel.tree()
    assert typed("detach", "01:00.0", "--unhealthy", "--yes")[0] == 0
    assert typed("attach", "01:00.0", "--yes")[0] == 0
    assert typed.kernel.binding(PciAddress.parse("01:00.0")) == DriverBinding("nvidia", None)
    after = {name: text for name, text in typed.kernel.tree().items() if "var/lib" not in name}
    assert after == before


@pytest.mark.parametrize("verb", ["detach", "attach", "info"])
def test_an_unknown_card_exited_0(tmp_path: Path, verb: str) -> None:
    typed = Typed(emulated_host(tmp_path))
    words = ["7f:00.0"] if verb == "info" else ["7f:00.0", "--yes"]
    assert typed(verb, *words)[0] == 2
    assert typed.kernel.writes == []


@pytest.mark.parametrize("verb", ["detach", "attach"])
def test_a_move_that_failed_exited_0(tmp_path: Path, verb: str) -> None:
    typed = Typed(emulated_host(tmp_path))
    if verb == "attach":
        assert typed("detach", "02:00.0", "--yes")[0] == 0
    typed.kernel.faults = [Fault("unbind", "0000:02:00.0", errno.EBUSY)]
    assert typed(verb, "02:00.0", "--yes")[0] == 1


def test_a_failing_virsh_exited_0(tmp_path: Path) -> None:
    typed = Typed(emulated_host(tmp_path))
    status, _ = typed("--connect", f"qemu+unix:///system?socket={tmp_path}/none", "down", "x")
    assert status == 1


def test_usb_and_serial_functions_were_extra_gpus(tmp_path: Path) -> None:
    typed = Typed(laptop(tmp_path))
    functions = {str(each) for each in read_host(tmp_path).devices if each.bus == 1}
    assert len(functions) == 4
    gpus = typed.gpus()
    assert set(gpus) & functions == {"0000:01:00.0"}
    assert {*gpus["0000:01:00.0"]["companions"], "0000:01:00.0"} == functions


def test_gpupci10_came_before_gpupci2(tmp_path: Path) -> None:
    buses = (0x0A, 0x10, 0x02, 0x09, 0x80, 0x01)
    cards = [
        Function(f"0000:{bus:02x}:00.0", T4, 0x030200, "nvidia", group=bus) for bus in buses
    ] + [Function("10000:01:00.0", T4, 0x030200, "nvidia", group=200)]
    typed = machine_of(tmp_path, *cards)
    listed = [address.rpartition(":00.0")[0] for address in typed.gpus()]
    assert listed == [f"0000:{bus:02x}" for bus in sorted(buses)] + ["10000:01"]


def test_names_followed_the_order_of_enumeration(tmp_path: Path) -> None:
    one = Function("0000:41:00.0", T4, 0x030200, "nvidia", group=1)
    before = machine_of(tmp_path / "before", one).gpus()
    new = Function("0000:01:00.0", "10de:2330", 0x030200, "nvidia", group=2)
    after = machine_of(tmp_path / "after", new, one).gpus()
    assert after["0000:41:00.0"] == before["0000:41:00.0"]


def test_there_were_no_iommu_groups(tmp_path: Path) -> None:
    card = Function("0000:01:00.0", T4, 0x030200, "nvidia", group=7)
    other = Function("0000:02:00.0", "1b21:1142", 0x0C0330, "xhci_hcd", group=7)
    typed = machine_of(tmp_path, card, other)
    gpu = typed.gpus()["0000:01:00.0"]
    assert (gpu["iommu_group"], gpu["group_members"]) == (7, [card.address, other.address])
    host = read_host(tmp_path)
    assert [str(each) for each in closure(host, host.gpus[0])] == gpu["group_members"]
    assert typed("detach", "01:00.0", "--unhealthy", "--yes")[0] == 0
    assert typed.kernel.binding(PciAddress.parse("02:00.0")).driver == "vfio-pci"


def rendered(host: str = "emulated_host") -> dict[str, str]:
    """The XML of a cluster's network and of each of its nodes, by libvirt's name of the schema."""
    allocation = allocate(two_gpus(), host=machine(host))
    folder = PurePosixPath("/var/lib/gpupt/x")
    found = {"network": render_view("network.xml.j2", view_network(allocation))}
    for placement in allocation.placements:
        view = view_domain(
            allocation,
            placement,
            image=Image("d", ("base",), folder / "i", "qcow2", 1 << 30, folder / "k", folder / "r"),
            disk=folder / "disk.qcow2",
            console=folder / "console.log",
            credentials=[Credential("gpupt.hosts", folder / "hosts")],
            accelerated=True,
            numa_nodes=1,
        )
        found[placement.node.name] = render_view("domain.xml.j2", view)
    return found


@pytest.mark.skipif(shutil.which("virt-xml-validate") is None, reason="libvirt's schemas are not")
@pytest.mark.parametrize("what", ["network", "frontend", "compute-0", "compute-1"])
def test_xml_was_rejected_by_libvirts_schema(tmp_path: Path, what: str) -> None:
    file = tmp_path / "x.xml"
    schema = "network" if what == "network" else "domain"

    def validate(text: str) -> int:
        file.write_text(text)
        words = ["virt-xml-validate", str(file), schema]
        return subprocess.run(words, capture_output=True, check=False, timeout=60).returncode

    text = rendered()[what]
    assert validate(text) == 0
    assert validate(text.replace("<name>", "<nmae>").replace("</name>", "</nmae>")) != 0


def test_several_typos_that_no_test_ever_ran() -> None:
    """Every module is imported, and the help of every verb is made."""
    names = [found.name for found in pkgutil.walk_packages(gpupt.__path__, "gpupt.")]
    modules = [importlib.import_module(name) for name in names if ".lab.guest" not in name]
    assert len(modules) > 60

    def run_help(command: click.Command, *words: str) -> None:
        result = CliRunner().invoke(cli, [*words, "--help"])
        assert result.exit_code == 0, (words, result.output)
        assert "Usage:" in result.stdout
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                verb = command.get_command(context, name)
                assert verb is not None, name
                run_help(verb, *words, name)

    run_help(cli)


# --- Rocks, pragma_boot, and what was around them --------------------------------------------


def test_there_was_no_rollback(tmp_path: Path) -> None:
    kernel = server(tmp_path / "machine")
    kernel.ids["nvidia"] = {"10de:2330"}
    before = kernel.tree()
    host = read_host(kernel.root, whole=True)
    gpus = [gpu.address for gpu in host.gpus if not gpu.device.boot_vga]
    plan = plan_detach(host, gpus=gpus, loans={}, preflight=Preflight())
    # The last of eight cannot be taken: the other seven come back.
    kernel.faults = [Fault("unbind", str(gpus[-1]), errno.EBUSY)]
    with Journal(tmp_path / "state") as journal:
        with pytest.raises(Failed, match="EBUSY"):
            execute(plan, world=World(kernel, journal, lambda line: None))
        assert journal.ledger.loans == {}
    assert kernel.tree() == before


@pytest.mark.parametrize(
    "line",
    [
        "cluster: !!python/object/apply:os.system ['touch {}']",
        "cluster: __import__('os').system('touch {}')",
        "cluster: {{{{ ''.__class__ }}}}; touch {}",
        "cluster: $(touch {})",
    ],
)
def test_configuration_was_executed_as_python(tmp_path: Path, line: str) -> None:
    witness = tmp_path / "executed"
    text = line.format(witness) + "\nrolls: [spark]\nnodes: []\n"
    with pytest.raises(BadInput):
        parse_specfile(text, file="c.yaml", known_rolls=("spark",))
    assert not witness.exists()


def test_state_was_scraped_from_a_listing_by_regular_expression() -> None:
    """What belongs to a cluster says so in libvirt's metadata; a name alone says nothing."""
    from xml.etree import ElementTree

    ours = ElementTree.fromstring(rendered()["compute-1"])
    membership = membership_in(ours)
    assert membership is not None
    assert (membership.cluster, membership.node) == ("herbarium", "compute-1")
    named = ElementTree.fromstring("<domain><name>herbarium-compute-1</name></domain>")
    assert membership_in(named) is None


def test_sleeps_stood_where_readiness_should_be_checked() -> None:
    """Nothing sleeps but within a wait that looks at a clock."""
    astray = []
    for file in sorted(Path(gpupt.__path__[0]).rglob("*.py")):
        tree = ast.parse(file.read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            words = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
            if "sleep" in words and not words & {"monotonic", "perf_counter"}:
                astray.append(f"{file.name}: {function.name}")
    assert astray == []


def test_a_second_run_appended_again(tmp_path: Path) -> None:
    typed = Typed(emulated_host(tmp_path))
    for verb in ("detach", "attach"):
        assert typed(verb, "02:00.0", "--yes")[0] == 0
        once, written = typed.kernel.tree(), len(typed.kernel.writes)
        assert typed(verb, "02:00.0", "--yes")[0] == 0
        assert len(typed.kernel.writes) == written
        again = typed.kernel.tree()
        assert {k: v for k, v in again.items() if "var/lib" not in k} == {
            k: v for k, v in once.items() if "var/lib" not in k
        }


def test_a_reused_address_failed_for_its_known_host_key(quick_path: Path) -> None:
    """Host keys are made for each cluster, and are known from a file of that cluster alone."""
    from gpupt.cli import nodes
    from gpupt.edges.clusterfolder import ClusterFolder

    # QEMU's own user passes through to the nodes' disks.
    quick_path.chmod(0o755)
    keys = []
    for name in ("one", "two"):
        folder = ClusterFolder(quick_path / name, "herbarium")
        folder.make(allocate(two_gpus(), host=machine("emulated_host")), image="d", hosts="")
        keys.append(folder.host_key("frontend"))
    assert keys[0] != keys[1]
    argv = inspect.getsource(nodes.ssh.callback)
    assert "GlobalKnownHostsFile=none" in argv
    assert "StrictHostKeyChecking=yes" in argv


def test_a_result_below_the_majority_class_passed_for_one() -> None:
    """0.7373 where the majority class alone makes 0.7394: kappa and the baseline tell it."""
    # Rows are labels, columns predictions: nearly all is said to be of the larger class.
    counts = np.array([[7370, 24], [2603, 3]])
    accuracy = float(np.trace(counts) / counts.sum())
    assert accuracy == pytest.approx(0.7373)
    assert metrics.majority(counts) == pytest.approx(0.7394)
    assert metrics.majority(counts) > accuracy
    assert abs(metrics.quadratic_kappa(counts)) < 0.01
