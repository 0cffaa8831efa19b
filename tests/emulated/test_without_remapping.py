"""A host that does not remap interrupts: doctor says so, and vfio proves it right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulatedhost import Host
from shapes import a_host, doctor
from tinyguest import TinyGuest

from gpupt.lab.host import Lab
from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def host(booted: Lab) -> Iterator[Host]:
    with a_host("no-intremap", like=booted, name="no-intremap") as host:
        yield host


def test_doctor_names_interrupts_that_are_not_remapped(host: Host) -> None:
    found = doctor(host)
    assert "iommu-off" not in found
    (remapping,) = found["intremap-off"]
    assert remapping["severity"] == "fail"
    assert any("/proc/interrupts" in line for line in remapping["evidence"])


def test_vfio_refuses_a_guest_where_interrupts_are_not_remapped(host: Host) -> None:
    host.gpupt("detach", "01:00.0", "--yes")
    guest = TinyGuest(host, "unremapped", (PciAddress.parse("01:00.0"),))
    try:
        assert "Operation not permitted" in guest.create()
        allow = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
        host.sh(f"echo Y > {allow}")
        (found,) = doctor(host)["intremap-off"]
        assert found["severity"] == "warn"
        guest.start()
        assert "10de2330" in (guest.seen() or ())
    finally:
        guest.destroy()
    host.gpupt("attach", "01:00.0", "--yes")
    assert host.driver("01:00.0") == "uio_pci_generic"
