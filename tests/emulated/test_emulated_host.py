"""gpupt on a host with an IOMMU, real drivers to lose and KVM, all of it emulated: what it
says, what it moves, and what is left when it is killed at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from emulatedhost import BENCH, NAME, PYTHON, Host, gpupt

from gpupt.edges.ssh import Ssh
from gpupt.lab.host import Lab
from gpupt.lab.story import Facts

pytestmark = pytest.mark.emulated
HERE = Path(__file__).resolve().parent
GPUS = ("0000:01:00.0", "0000:02:00.0")
FUNCTIONS = (*GPUS, "0000:02:00.1")
IsHome = Callable[[], None]
SPEC = """\
cluster: tiny
rolls: [node]
network: {subnet: 10.72.0.0/24}
nodes:
  - {name: frontend, role: frontend, cpus: 1, memory: 1 GiB}
  - {name: compute-0, role: compute, cpus: 1, memory: 1 GiB, gpus: 2}
"""


# The emulated host itself


def test_a_second_up_does_nothing(booted: Lab) -> None:
    again = gpupt("lab", "up", "--name", NAME)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    listed = json.loads(gpupt("--json", "lab", "list").stdout)["labs"]
    assert [(e["pid"], e["running"]) for e in listed if e["name"] == NAME] == [(booted.pid, True)]


def test_run_passes_streams_and_status_on(booted: Lab) -> None:
    script = "echo out; echo 'to err' >&2; exit 7"
    done = gpupt("lab", "run", "--name", NAME, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "to err\n")


def test_another_host_key_is_refused(booted: Lab) -> None:
    line = (booted.folder / "key.pub").read_text()
    with pytest.raises(Exception, match="another host key"):
        Ssh.connect(
            "127.0.0.1",
            port=booted.port,
            key=booted.key,
            host_key=line,
            deadline=60,
            waiting_for="the emulated host",
        )


# What gpupt says of it


def test_doctor_finds_nothing_that_hinders(host: Host) -> None:
    found = host.gpupt("doctor", "--probe-kvm")
    assert [each for each in found["findings"] if each["severity"] == "fail"] == []
    assert {"iommu-off", "group-not-viable", "kvm-unusable"} <= set(found["checked"])


def test_list_shows_the_cards(host: Host) -> None:
    gpus = {gpu["address"]: gpu for gpu in host.gpupt("list")["gpus"]}
    assert list(gpus) == ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"]
    h100, t4, display = gpus.values()
    assert (h100["vendor_id"], h100["device_id"]) == ("10de", "2330")
    assert h100["driver"] == "uio_pci_generic"
    assert t4["companions"] == ["0000:02:00.1"]
    assert t4["group_members"] == ["0000:02:00.0", "0000:02:00.1"]
    assert (display["boot_vga"], display["driver"]) == (True, "bochs-drm")


# Moving GPUs


def test_detach_and_attach(host: Host, as_booted: Facts, is_home: IsHome) -> None:
    detached = host.gpupt("detach", *GPUS, "--yes")
    assert [a["kind"] for a in detached["actions"]].count("BindFunction") == 3
    facts = host.facts().functions
    by_address = {str(address): each for address, each in facts.items()}
    for address in FUNCTIONS:
        assert (by_address[address].driver, by_address[address].override) == ("vfio-pci",) * 2
    assert by_address["0000:03:00.0"].driver == "bochs-drm"
    assert host.sh("ls /dev/vfio").stdout.split()[-1] == "vfio"
    assert host.gpupt("detach", *GPUS, "--yes")["actions"] == [], "a second detach is nothing"
    states = [gpu["state"] for gpu in host.gpupt("list")["gpus"]]
    assert states == ["detached", "detached", "host"]
    host.gpupt("attach", "--all", "--yes")
    is_home()
    assert host.gpupt("attach", "--all", "--yes")["actions"] == []


def test_the_boot_display_is_refused(host: Host, is_home: IsHome) -> None:
    host.gpupt("detach", "03:00.0", "--yes", status=3)
    is_home()


def test_without_consent_nothing_is_touched(host: Host, is_home: IsHome) -> None:
    host.gpupt("detach", "01:00.0", status=2)
    is_home()


# Killed


def test_a_killed_detach_is_undone(host: Host, is_home: IsHome) -> None:
    host.put(HERE / "dying.py")
    words = ["detach", "--all", "--yes"]
    done = host.run(PYTHON, f"{BENCH}/dying.py", "after", "6", "--", *words, check=False)
    assert done.status in (-1, 137), done.stderr
    host.gpupt("detach", "--all", "--yes", status=3)  # nothing new before recover
    host.gpupt("recover", "--yes")
    is_home()


def test_a_killed_attach_is_carried_on(host: Host, is_home: IsHome) -> None:
    host.put(HERE / "dying.py")
    host.gpupt("detach", "--all", "--yes")
    words = ["attach", "--all", "--yes"]
    done = host.run(PYTHON, f"{BENCH}/dying.py", "after", "4", "--", *words, check=False)
    assert done.status in (-1, 137), done.stderr
    host.gpupt("recover", "--yes")
    is_home()


def test_one_at_a_time(host: Host, is_home: IsHome) -> None:
    host.put(HERE / "dying.py")
    freeze(host, "2")
    try:
        done = host.run("gpupt", "attach", "--all", "--yes", check=False)
        assert done.status == 3
        assert "PID" in done.stderr
    finally:
        host.sh(f"kill -KILL $(cat {BENCH}/frozen.pid); rm /run/frozen")
    host.gpupt("recover", "--yes")
    is_home()


def test_a_hard_reset_in_mid_detach(host: Host, is_home: IsHome) -> None:
    host.put(HERE / "dying.py")
    freeze(host, "5")
    assert host.driver("01:00.0") == "vfio-pci"
    host.reset()
    assert host.driver("01:00.0") == "uio_pci_generic", "drivers do not outlive a reset"
    assert host.gpupt("recover", "--dry-run")["actions"] != [] or unfinished(host)
    host.gpupt("recover", "--yes")
    is_home()
    host.gpupt("detach", "01:00.0", "--yes")
    host.gpupt("attach", "01:00.0", "--yes")


def test_a_killed_up_leaves_nothing(host: Host, is_home: IsHome) -> None:
    host.run("mkdir", "-p", BENCH)
    host.ssh.run(["tee", f"{BENCH}/tiny.yaml"], stdin=SPEC, deadline=20)
    host.sh(
        f"setsid gpupt up {BENCH}/tiny.yaml --yes > {BENCH}/up.log 2>&1 & echo $! > {BENCH}/up.pid"
    )
    await_true(host, 'virsh -q list | grep -q "tiny.*compute"', deadline=240, log="up.log")
    assert host.driver("01:00.0") == "vfio-pci"
    host.sh(f"kill -KILL $(cat {BENCH}/up.pid)")
    assert host.run("virsh", "-q", "list").stdout.strip()
    host.gpupt("recover", "--yes", deadline=300)
    assert host.run("virsh", "-q", "list", "--all").stdout.strip() == ""
    assert "tiny" not in host.run("virsh", "-q", "net-list", "--all").stdout
    assert host.sh("ls /var/lib/gpupt/clusters 2>/dev/null || true").stdout.split() == []
    is_home()


def unfinished(host: Host) -> bool:
    """Whether a person is told that something was cut short."""
    return "recover" in host.run("gpupt", "status", check=False).stdout


def freeze(host: Host, number: str) -> None:
    """Start a detach of all that stops at the write of that number; returns when it has."""
    host.sh("rm -f /run/frozen")
    words = f"{PYTHON} {BENCH}/dying.py freeze {number} -- detach --all --yes"
    host.sh(f"setsid {words} > {BENCH}/frozen.log 2>&1 & echo $! > {BENCH}/frozen.pid")
    await_true(host, "test -e /run/frozen", deadline=90, log="frozen.log")


def await_true(host: Host, script: str, *, deadline: float, log: str) -> None:
    end = time.monotonic() + deadline
    while host.sh(script, check=False).status != 0:
        if time.monotonic() > end:
            said = host.sh(f"cat {BENCH}/{log}", check=False).stdout
            pytest.fail(f"not so after {deadline:g} s: {script}\n{said}")
        time.sleep(1)
