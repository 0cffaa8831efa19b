"""How a guest has the host's functions is read from its domain's XML."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from gpupt.edges.guests import guest_in
from gpupt.edges.hypervisor import Hypervisor
from gpupt.model.facts import Guest, GuestFunction
from gpupt.model.pci import PciAddress

HOSTDEV = """
<hostdev mode="subsystem" type="pci" managed="no">
  <source><address domain="0x0000" bus="0x41" slot="0x00" function="0x0"/></source>
  <address type="pci" domain="0x0000" bus="0x05" slot="0x00" function="0x0"/>
</hostdev>
"""
XML = """
<domain type="{type}" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>{name}</name>
  <memory unit="KiB">67108864</memory>
  <os {os}><type arch="x86_64" machine="pc-q35-10.0">hvm</type>{loader}</os>
  {cpu}
  <devices>
    <controller type="pci" index="0" model="pcie-root"/>
    <controller type="pci" index="5" model="pcie-root-port"/>
    <controller type="usb" index="0" model="none"/>
    {devices}
  </devices>
  {more}
</domain>
"""


def xml(**given: str) -> str:
    usual = {"type": "kvm", "name": "one", "os": "", "loader": "", "cpu": "", "more": ""}
    return XML.format(**{**usual, "devices": HOSTDEV, **given})


def guest(**given: str) -> Guest:
    found = guest_in(ElementTree.fromstring(xml(**given)))
    assert found is not None
    return found


def test_all_that_is_read() -> None:
    assert guest(cpu='<cpu mode="host-passthrough"/>') == Guest(
        name="one",
        machine="pc-q35-10.0",
        functions=(GuestFunction(PciAddress.parse("41:00.0"), 5),),
        controllers={0: "pcie-root", 5: "pcie-root-port"},
        memory=64 << 30,
        host_bits=True,
    )


def test_a_domain_without_functions_of_the_host_is_no_guest() -> None:
    usb = '<hostdev mode="subsystem" type="usb"><source/></hostdev>'
    assert guest_in(ElementTree.fromstring(xml(devices=usb))) is None


def test_an_address_that_libvirt_has_not_given_yet() -> None:
    source = HOSTDEV.partition("</source>")[0] + "</source></hostdev>"
    assert guest(devices=source).functions == (GuestFunction(PciAddress.parse("41:00.0"), None),)


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        ({"cpu": '<cpu mode="host-passthrough"/>'}, (True, None)),
        ({"cpu": '<cpu mode="maximum"/>'}, (True, None)),
        ({"cpu": '<cpu mode="host-model"/>'}, (False, None)),
        ({"cpu": "<cpu><model>Skylake-Server</model></cpu>"}, (False, 40)),
        ({}, (False, 40)),
        ({"type": "qemu", "cpu": '<cpu mode="maximum"/>'}, (False, 40)),
        (
            {"cpu": '<cpu mode="host-model"><maxphysaddr mode="emulate" bits="42"/></cpu>'},
            (False, 42),
        ),
        ({"cpu": '<cpu mode="custom"><maxphysaddr mode="passthrough"/></cpu>'}, (True, None)),
        ({"cpu": '<cpu mode="custom"><maxphysaddr mode="emulate"/></cpu>'}, (False, None)),
    ],
)
def test_address_bits(given: dict[str, str], bits: tuple[bool, int | None]) -> None:
    found = guest(**given)
    assert (found.host_bits, found.address_bits) == bits


@pytest.mark.parametrize(
    ("given", "uefi"),
    [
        ({"os": 'firmware="efi"'}, True),
        ({"loader": '<loader readonly="yes" type="pflash">/usr/share/OVMF.fd</loader>'}, True),
        ({"os": 'firmware="bios"'}, False),
        ({}, False),
    ],
)
def test_firmware(given: dict[str, str], uefi: bool) -> None:
    assert guest(**given).uefi is uefi


@pytest.mark.parametrize(
    ("more", "window"),
    [
        (
            '<qemu:commandline><qemu:arg value="-fw_cfg"/>'
            '<qemu:arg value="name=opt/ovmf/X-PciMmio64Mb,string=65536"/></qemu:commandline>',
            64 << 30,
        ),
        (
            '<sysinfo type="fwcfg"><entry name="opt/ovmf/X-PciMmio64Mb">262144</entry></sysinfo>',
            256 << 30,
        ),
        ('<sysinfo type="fwcfg"><entry name="opt/other">262144</entry></sysinfo>', None),
        (
            '<sysinfo type="fwcfg"><entry name="opt/ovmf/X-PciMmio64Mb">much</entry></sysinfo>',
            None,
        ),
    ],
)
def test_the_window_that_ovmf_was_told_to_keep(more: str, window: int | None) -> None:
    assert guest(more=more).window == window


class Handle:
    """A domain of libvirt's, as far as it is read."""

    def __init__(self, text: str) -> None:
        self.text = text

    def XMLDesc(self, flags: int) -> str:
        assert flags == 0
        return self.text


class Connection:
    """A connection of libvirt's that lists some domains."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def listAllDomains(self, flags: int) -> list[Handle]:
        assert flags == 0
        return [Handle(text) for text in self.texts]


def test_every_domain_is_looked_at_and_guests_come_by_name() -> None:
    pytest.importorskip("libvirt")
    texts = (xml(name="two"), xml(name="none", devices=""), xml(name="one"))
    found = Hypervisor(Connection(*texts), uri="fake:///").guests()
    assert [each.name for each in found] == ["one", "two"]
