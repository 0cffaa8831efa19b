"""The gate around loans, with real passthrough and an NVML that is the tests' own.

The host's cards are emulated, and NVIDIA's library has nothing to say of them: the one that
stands in for it answers as a scenario says.  What is proved is what gpupt does with the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fakenvml
import pytest
from emulatedhost import BENCH, PYTHON, Host

pytestmark = pytest.mark.emulated
BARE, CARD = "0000:01:00.0", "0000:02:00.0"
PLACE = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
SCENARIO = "/etc/fakenvml.ini"
IsHome = Callable[[], None]
Scenario = Callable[..., None]
# What `up` notes when a node gets a GPU; the node itself is not what is tested here.
LEND = f"""
from dataclasses import replace
from pathlib import Path
from gpupt.edges.journal import Journal
with Journal(Path("/var/lib/gpupt")) as journal:
    for gpu, loan in journal.ledger.loans.items():
        if str(gpu) == "{CARD}":
            journal.record(replace(loan, cluster="herbarium", node="compute-0"))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakenvml.build(tmp_path_factory.mktemp("fakenvml")) / fakenvml.SONAME


@pytest.fixture
def scenario(host: Host, library: Path, tmp_path: Path) -> Iterator[Scenario]:
    """Lets the host's library say something of the second card; both are well at first."""
    host.ssh.put(library, PLACE)

    def say(**changes: fakenvml.Value) -> None:
        well = [fakenvml.h200(each).but(power_enforced=700_000) for each in (BARE, CARD)]
        file = fakenvml.write_scenario(tmp_path / "s.ini", [well[0], well[1].but(**changes)])
        host.ssh.put(file, SCENARIO)

    say()
    try:
        yield say
    finally:
        host.sh(f"rm -f {PLACE} {SCENARIO}")
        host.run("gpupt", "unfence", "--all", "--yes", check=False)


def statuses(host: Host, *, status: int) -> dict[str, str]:
    said = host.gpupt("health", status=status)
    return {gpu["address"]: gpu["status"] for gpu in said["gpus"]}


def fenced(host: Host) -> dict[str, str]:
    return {each["gpu"]: each["reason"] for each in host.gpupt("status")["fences"]}


def test_a_card_made_bad_between_two_loans_is_not_lent(
    host: Host, scenario: Scenario, is_home: IsHome
) -> None:
    assert statuses(host, status=0)[CARD] == "ok"
    host.gpupt("detach", CARD, "--yes")
    host.gpupt("attach", CARD, "--yes")
    assert fenced(host) == {}
    scenario(remapped=(1, 1, 0, 1))
    assert statuses(host, status=2) == {BARE: "ok", CARD: "fail", "0000:03:00.0": "ok"}
    refused = host.run("gpupt", "detach", CARD, "--yes", check=False)
    assert refused.status == 3
    assert "remap_failure" in refused.stderr
    # The other card is still lent, and --all leaves the bad one.
    host.gpupt("detach", "--all", "--yes")
    assert (host.driver("01:00.0"), host.driver("02:00.0")) == ("vfio-pci", "bochs-drm")
    host.gpupt("attach", "--all", "--yes")
    is_home()


def test_a_card_that_goes_bad_while_it_is_away_is_fenced_on_its_return(
    host: Host, scenario: Scenario, is_home: IsHome
) -> None:
    host.gpupt("detach", CARD, "--yes")
    scenario(ecc_volatile=(0, 3))
    back = host.run("gpupt", "attach", CARD, "--yes")
    assert f"{CARD} is fenced" in back.stderr
    is_home()
    assert list(fenced(host)) == [CARD]
    assert "ecc_uncorrected" in fenced(host)[CARD]
    # It stays fenced though it is well again: a person says when it is mended.
    scenario()
    refused = host.run("gpupt", "detach", CARD, "--yes", check=False)
    assert refused.status == 3
    assert "it is fenced" in refused.stderr
    host.gpupt("unfence", CARD, "--yes")
    host.gpupt("detach", CARD, "--yes")
    host.gpupt("attach", CARD, "--yes")
    is_home()


def test_what_a_guest_had_is_reset_for_real_and_looked_at(
    host: Host, scenario: Scenario, is_home: IsHome
) -> None:
    host.gpupt("detach", CARD, "--yes")
    host.ssh.run([PYTHON, "-"], stdin=LEND, deadline=60)
    scenario(error=15)
    plan = host.gpupt("down", "herbarium", "--dry-run")["actions"]
    kinds = [each["kind"] for each in plan]
    assert kinds.index("ResetGpu") < kinds.index("BindFunction") < kinds.index("CheckGpu")
    host.gpupt("down", "herbarium", "--yes")
    assert "gpu_lost" in fenced(host)[CARD]
    is_home()


def test_a_library_that_crashes_never_passes(host: Host, scenario: Scenario) -> None:
    scenario(temperature=fakenvml.CRASH)
    assert statuses(host, status=2)[CARD] == "fail"


# In a node: the image that it boots gets the library, as a roll of somebody's would bring it.

# QEMU runs as a user of its own, and passes through no home of root.
STATE = "/var/lib/gpupt-ward"
DISK = f"{STATE}/disk.qcow2"
NODES = """\
cluster: ward
rolls: [node]
network: {subnet: 10.73.0.0/24}
nodes:
  - {name: frontend, role: frontend, cpus: 1, memory: 1 GiB, gpus: 1}
"""
DOCTORED = f"""
import json, pathlib
(record,) = pathlib.Path("/var/lib/gpupt/images").glob("*/image.json")
told = json.loads(record.read_text())
folder = pathlib.Path("{STATE}/images") / told["digest"]
folder.mkdir(parents=True)
for name in ("kernel", "initrd"):
    (folder / told[name]).symlink_to(record.parent / told[name])
print(told["disk"])
told |= {{"disk": "{DISK}", "format": "qcow2"}}
(folder / "image.json").write_text(json.dumps(told))
"""
WELL = f"{BENCH}/well.ini"


@pytest.fixture
def image(host: Host, library: Path, tmp_path: Path) -> Iterator[None]:
    """A state folder whose one image has the tests' library in it, and all is well by it."""
    host.sh(f"rm -rf {STATE}; mkdir -p {STATE} {BENCH}")
    base = host.ssh.run([PYTHON, "-"], stdin=DOCTORED, deadline=60).stdout.strip()
    # Whatever address the guest sees its card at.
    cards = [fakenvml.h200(f"0000:{bus:02x}:00.0").but(power_enforced=700_000) for bus in range(16)]
    host.ssh.put(fakenvml.write_scenario(tmp_path / "well.ini", cards), WELL)
    host.ssh.put(library, f"{BENCH}/{fakenvml.SONAME}")
    host.sh(
        f"set -e; qemu-img create -q -f qcow2 -b {base} -F raw {DISK}; modprobe nbd;"
        f" qemu-nbd -c /dev/nbd0 {DISK}; udevadm settle; mkdir -p {STATE}/root;"
        f" mount /dev/nbd0 {STATE}/root; cp {BENCH}/{fakenvml.SONAME} {STATE}/root{PLACE};"
        f" cp {WELL} {STATE}/root{SCENARIO}; umount {STATE}/root; qemu-nbd -d /dev/nbd0"
    )
    yield
    host.run("gpupt", "--state", STATE, "down", "ward", "--yes", check=False, deadline=300)
    host.sh(f"rm -rf {STATE}")


@pytest.mark.usefixtures("image")
def test_a_node_is_asked_how_its_cards_are(host: Host, is_home: IsHome) -> None:
    host.ssh.run(["tee", f"{BENCH}/ward.yaml"], stdin=NODES, deadline=20)
    ours = ("--state", STATE)
    up = host.run("gpupt", *ours, "up", f"{BENCH}/ward.yaml", "--yes", deadline=600)
    assert "frontend: its 1 GPUs are well" in up.stderr
    # An emulated card has no driver in the node, and that is all there is to say.
    said = host.gpupt(*ours, "health", "ward", status=1, deadline=300)
    assert (said["status"], list(said["nodes"])) == ("warn", ["frontend"])
    (gpu,) = said["nodes"]["frontend"]["gpus"]
    assert [each["id"] for each in gpu["checks"] if each["status"] == "warn"] == ["driver"]
    assert len([each for each in gpu["checks"] if each["status"] == "ok"]) >= 10
    ill = f"sed -i 's/^remapped = .*/remapped = 0,1,0,1/' {SCENARIO}"
    host.run("gpupt", *ours, "ssh", "ward", "frontend", ill, deadline=60)
    said = host.gpupt(*ours, "health", "ward", status=2, deadline=300)
    (gpu,) = said["nodes"]["frontend"]["gpus"]
    assert [each["id"] for each in gpu["checks"] if each["status"] == "fail"] == ["remap_failure"]
    host.gpupt(*ours, "down", "ward", "--yes", deadline=300)
    is_home()
