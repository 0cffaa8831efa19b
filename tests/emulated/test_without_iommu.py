"""A host whose firmware has the IOMMU off: what gpupt says of it, and leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulatedhost import Host, gpupt
from shapes import a_host, doctor, gpus, refusal

from gpupt.lab.host import Lab

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def host(booted: Lab) -> Iterator[Host]:
    with a_host("no-iommu", like=booted, name="no-iommu") as host:
        yield host


def test_doctor_names_an_iommu_that_is_off(host: Host) -> None:
    # What the kernel says of it proves nothing, and it says it here too.
    assert "intel_iommu=on" in host.run("cat", "/proc/cmdline").stdout
    assert "DMAR: IOMMU enabled" in host.run("dmesg").stdout
    (found,) = doctor(host)["iommu-off"]
    assert found["severity"] == "fail"
    assert any("/sys/kernel/iommu_groups is empty" in line for line in found["evidence"])
    assert any("intel_iommu=on" in line for line in found["evidence"])
    assert "firmware" in found["remedy"]


def test_without_an_iommu_nothing_is_taken(host: Host) -> None:
    shown = gpus(host)
    assert [(gpu["iommu_group"], gpu["state"]) for gpu in shown.values()] == [(None, "host")] * 2
    said = refusal(host, "detach", "01:00.0", "--yes")
    assert "no IOMMU group" in said
    assert "no GPU can be detached" in refusal(host, "detach", "--all", "--yes")


def test_what_the_kernel_says_without_an_iommu(host: Host) -> None:
    """The refusal spares people this: a write error, and a card on no driver."""
    host.sh("modprobe vfio-pci")
    place = "/sys/bus/pci/devices/0000:01:00.0"
    host.sh(f"echo vfio-pci > {place}/driver_override")
    host.sh(f"echo 0000:01:00.0 > {place}/driver/unbind")
    bind = "echo 0000:01:00.0 > /sys/bus/pci/drivers/vfio-pci/bind"
    done = host.sh(bind, check=False)
    assert done.status != 0
    assert host.driver("01:00.0") is None
    assert gpus(host)["01:00.0"]["state"] == "driverless"
    recovered = host.gpupt("recover", "--yes")
    assert [each["kind"] for each in recovered["actions"]] == ["ReleaseFunction"]
    host.sh("echo 0000:01:00.0 > /sys/bus/pci/drivers_probe")
    assert host.driver("01:00.0") == "uio_pci_generic"


# Its end: any host would do


def test_a_panic_ends_it_and_is_told_at_once(host: Host) -> None:
    name = host.lab.name
    crash = "echo c > /proc/sysrq-trigger; sleep 3600"
    told = gpupt("lab", "run", "--name", name, "--", "sh", "-c", crash, deadline=120)
    assert told.returncode != 0
    after = gpupt("lab", "run", "--name", name, "--", "true")
    assert after.returncode != 0
    assert "is not up" in after.stderr
    assert "Kernel panic" in (host.lab.folder / "console.log").read_text(errors="replace")
