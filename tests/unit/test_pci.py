"""Addresses, ids, and which functions are GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpupt.edges.pciids import find_name
from gpupt.errors import BadInput
from gpupt.model.gpus import find_gpus, state_of
from gpupt.model.host import Gpu, GpuState, Loan
from gpupt.model.pci import DriverBinding, PciAddress, PciDevice, PciId

ADDRESSES = st.builds(
    PciAddress,
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFF),
    st.integers(0, 31),
    st.integers(0, 7),
)


def device(address: str, id: str, class_code: int, driver: str | None = None) -> PciDevice:
    vendor, number = (int(part, 16) for part in id.split(":"))
    return PciDevice(
        PciAddress.parse(address), PciId(vendor, number), class_code, DriverBinding(driver, None)
    )


def gpus_among(*devices: PciDevice) -> list[tuple[str, list[str]]]:
    found = find_gpus({each.address: each for each in devices})
    return [(str(gpu.address), [str(other) for other in gpu.companions]) for gpu in found]


@given(ADDRESSES)
def test_addresses_survive_text(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address


@given(st.text(max_size=20))
def test_other_text_is_refused_by_name(text: str) -> None:
    try:
        assert PciAddress.parse(PciAddress.parse(text).__str__())
    except BadInput as error:
        assert "not a PCI address" in error.brief


def test_addresses_order_as_numbers() -> None:
    texts = ["0a:00.0", "09:00.0", "10000:01:00.0", "01:1f.7"]
    assert [str(a) for a in sorted(PciAddress.parse(text) for text in texts)] == [
        "0000:01:1f.7",
        "0000:09:00.0",
        "0000:0a:00.0",
        "10000:01:00.0",
    ]


@pytest.mark.parametrize("text", ["", "41", "41:00", "41:20.0", "41:00.8", "g1:00.0", "1:2:3:4.0"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BadInput):
        PciAddress.parse(text)


@pytest.mark.parametrize(
    ("id", "class_code", "counts"),
    [
        ("10de:2330", 0x030200, True),
        ("10de:1eb8", 0x030000, True),
        ("10de:2901", 0x120000, True),
        ("1002:74a1", 0x120000, True),
        ("1a03:2000", 0x030000, True),
        ("8086:0bd5", 0x038000, True),
        ("8086:7d1d", 0x120000, False),  # an NPU in the root complex
        ("1da3:1020", 0x120000, False),  # an accelerator of no GPU vendor
        ("10de:22a3", 0x068000, False),  # an NVSwitch
        ("10de:10f9", 0x040300, False),
    ],
)
def test_classes_of_gpus(id: str, class_code: int, counts: bool) -> None:
    assert bool(gpus_among(device("00:0b.0", id, class_code))) is counts


def test_companions_are_no_gpus() -> None:
    card = [
        device("01:00.3", "10de:1adb", 0x0C8000),
        device("01:00.2", "10de:1ada", 0x0C0330),
        device("01:00.0", "10de:1f11", 0x030000),
        device("01:00.1", "10de:10f9", 0x040300),
        device("02:00.0", "10de:10f9", 0x040300),
    ]
    assert gpus_among(*card) == [("0000:01:00.0", ["0000:01:00.1", "0000:01:00.2", "0000:01:00.3"])]


def test_a_second_display_function_is_a_companion() -> None:
    heads = [device("03:00.1", "1002:5940", 0x038000), device("03:00.0", "1002:5960", 0x030000)]
    assert gpus_among(*heads) == [("0000:03:00.0", ["0000:03:00.1"])]


def test_virtual_functions_are_gpus_of_their_own() -> None:
    whole = device("41:00.0", "10de:2230", 0x030200)
    virtual = replace(device("41:00.4", "10de:2230", 0x030200), physfn=whole.address)
    assert gpus_among(whole, virtual) == [("0000:41:00.0", []), ("0000:41:00.4", [])]


@pytest.mark.parametrize(
    ("driver", "node", "lost", "state"),
    [
        ("nvidia", None, False, GpuState.HOST),
        (None, None, False, GpuState.DRIVERLESS),
        ("vfio-pci", None, False, GpuState.DETACHED),
        ("nvgrace_gpu_vfio_pci", None, False, GpuState.DETACHED),
        ("vfio-pci", "n1", False, GpuState.LENT),
        ("vfio-pci", "n1", True, GpuState.LOST),
    ],
)
def test_who_has_it(driver: str | None, node: str | None, lost: bool, state: GpuState) -> None:
    card = replace(device("41:00.0", "10de:2330", 0x030200, driver), lost=lost)
    loan = Loan(card.address, (), "c", node) if node else None
    assert state_of(Gpu(card), loan) is state


NAMES = b"""
# a comment
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t744c  Navi 31 [Radeon RX 7900]
\t\t1002 0e3b  a subsystem

10de  NVIDIA Corporation
\t2330  GH100 [H100 SXM5 80GB]
\t744c  not this one
10df  Emulex Corporation
\t2331  of another vendor
"""


@pytest.mark.parametrize(
    ("id", "name"),
    [
        (PciId(0x10DE, 0x2330), "NVIDIA Corporation GH100 [H100 SXM5 80GB]"),
        (PciId(0x1002, 0x744C), "Advanced Micro Devices, Inc. [AMD/ATI] Navi 31 [Radeon RX 7900]"),
        (PciId(0x10DE, 0x2331), None),
        (PciId(0x1002, 0x0E3B), None),
        (PciId(0xFFFF, 0x0001), None),
    ],
)
def test_names(id: PciId, name: str | None) -> None:
    assert find_name(NAMES, id) == name
