"""Cards that leave, fall off the bus or are taken back while gpupt does not look; a host that
is reset in the middle of giving them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from emulatedhost import BENCH, PYTHON, Host
from shapes import doctor, gpus, refusal
from tinyguest import TinyGuest

from gpupt.lab.story import Facts
from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.emulated
HERE = Path(__file__).resolve().parent
GPU, CARD, SOUND = "01:00.0", "02:00.0", "02:00.1"
# The first card as it is in the default topology, to be put in again.
FIRST = {"driver": "edu-10de-2330", "bus": "port0", "addr": "0.0", "id": "gpu0"}
IsHome = Callable[[], None]


def pull(host: Host) -> None:
    """Take the first card out; returns when it is gone from the bus."""
    with host.lab.qmp() as qmp:
        qmp.command("device_del", id="gpu0")
        # With its path alone it tells of the device's end, with its name of QEMU's.
        qmp.wait_for("DEVICE_DELETED", deadline=60)
    assert host.sh(f"test -e /sys/bus/pci/devices/0000:{GPU}", check=False).status != 0


def put_in(host: Host) -> None:
    """Put the first card in again; returns when its host driver has it."""
    with host.lab.qmp() as qmp:
        qmp.command("device_add", **FIRST, dma_mask=0xFFFFFFFFFFFFFFFF)
    await_driver(host, GPU, "uio_pci_generic")


def await_driver(host: Host, address: str, driver: str, *, deadline: float = 60) -> None:
    end = time.monotonic() + deadline
    while (now := host.driver(address)) != driver:
        assert time.monotonic() < end, f"{address} is on {now}"
        time.sleep(0.5)


# Taken back behind gpupt's back


def test_a_companion_that_went_back_is_named(host: Host, is_home: IsHome) -> None:
    host.gpupt("detach", CARD, "--yes")
    place = f"/sys/bus/pci/devices/0000:{SOUND}"
    host.sh(f"echo > {place}/driver_override; echo 0000:{SOUND} > {place}/driver/unbind")
    host.sh(f"echo 0000:{SOUND} > /sys/bus/pci/drivers_probe")
    assert host.driver(SOUND) == "snd_hda_intel"
    guest = TinyGuest(host, "halved", (PciAddress.parse(CARD),))
    try:
        assert "not viable" in guest.create()
    finally:
        guest.destroy()
    (found,) = doctor(host)["companion-missed"]
    assert (found["severity"], found["subject"][5:]) == ("fail", CARD)
    assert f"0000:{SOUND} is still on snd_hda_intel" in found["brief"]
    again = host.gpupt("detach", CARD, "--yes")["actions"]
    assert [(each["kind"], each["subject"][-7:]) for each in again] == [("BindFunction", SOUND)]
    assert "companion-missed" not in doctor(host)
    host.gpupt("attach", CARD, "--yes")
    is_home()


# Cards that leave


def test_a_card_pulled_from_its_host_driver(host: Host, is_home: IsHome) -> None:
    pull(host)
    try:
        assert list(gpus(host)) == [CARD, "03:00.0"]
        assert host.gpupt("status")["loans"] == []
        assert "lost-device" not in doctor(host)
        host.gpupt("attach", GPU, "--yes", status=2)
        host.gpupt("detach", GPU, "--yes", status=2)
        assert host.gpupt("recover", "--yes")["actions"] == []
    finally:
        put_in(host)
    is_home()


def test_the_loan_of_a_card_pulled_while_detached_is_kept(host: Host, is_home: IsHome) -> None:
    host.gpupt("detach", GPU, "--yes")
    pull(host)
    try:
        assert list(gpus(host)) == [CARD, "03:00.0"]
        assert [loan["gpu"][5:] for loan in host.gpupt("status")["loans"]] == [GPU]
        doctor(host)
        # The card may come back: its loan is not forgotten.
        assert host.gpupt("recover", "--yes")["actions"] == []
        assert [loan["gpu"][5:] for loan in host.gpupt("status")["loans"]] == [GPU]
    finally:
        put_in(host)
    # A card that comes back is on its host driver, whatever the loan says; detach puts it right.
    assert gpus(host)[GPU]["state"] == "host"
    host.gpupt("detach", GPU, "--yes")
    assert host.driver(GPU) == "vfio-pci"
    host.gpupt("attach", GPU, "--yes")
    is_home()


def test_a_card_that_is_gone_is_given_back_on_paper(host: Host, is_home: IsHome) -> None:
    host.gpupt("detach", GPU, "--yes")
    pull(host)
    try:
        given = host.gpupt("attach", GPU, "--yes")["actions"]
        assert [each["kind"] for each in given] == ["EraseLoan"]
        assert host.gpupt("status")["loans"] == []
    finally:
        put_in(host)
    is_home()


# Off the bus


@contextmanager
def off_the_bus(host: Host, address: str) -> Iterator[None]:
    """Cut the power of the card's slot: its config space reads ones; then power it again."""
    port = host.sh(f"basename $(dirname $(readlink -f /sys/bus/pci/devices/0000:{address}))")
    power = f"setpci -s {port.stdout.strip()} CAP_EXP+18.w"
    host.sh(f"{power}=0400:0400")
    try:
        yield
    finally:
        host.sh(f"{power}=0000:0400")


def test_a_card_off_the_bus_is_lost_until_it_is_powered_again(host: Host, is_home: IsHome) -> None:
    with off_the_bus(host, GPU):
        assert gpus(host)[GPU]["state"] == "lost"
        (found,) = doctor(host)["lost-device"]
        assert (found["severity"], found["subject"][5:]) == ("fail", GPU)
        assert "fallen off the bus" in refusal(host, "detach", GPU, "--yes")
        taken = host.gpupt("detach", "--all", "--dry-run")["actions"]
        assert all(GPU not in each["subject"] for each in taken)
    # It lost its registers: the kernel is to find it anew.
    host.sh(f"echo 1 > /sys/bus/pci/devices/0000:{GPU}/remove; echo 1 > /sys/bus/pci/rescan")
    await_driver(host, GPU, "uio_pci_generic")
    assert gpus(host)[GPU]["state"] == "host"
    assert "lost-device" not in doctor(host)
    is_home()


def test_a_detached_card_off_the_bus_comes_home_once_it_is_powered(
    host: Host, is_home: IsHome
) -> None:
    host.gpupt("detach", GPU, "--yes")
    with off_the_bus(host, GPU):
        assert gpus(host)[GPU]["state"] == "lost"
        assert [loan["gpu"][5:] for loan in host.gpupt("status")["loans"]] == [GPU]
        assert host.gpupt("recover", "--yes")["actions"] == []
    host.sh(f"echo 1 > /sys/bus/pci/devices/0000:{GPU}/remove; echo 1 > /sys/bus/pci/rescan")
    await_driver(host, GPU, "uio_pci_generic")
    host.gpupt("attach", GPU, "--yes")
    is_home()


# A reset


def test_a_hard_reset_in_mid_attach(host: Host, as_booted: Facts, is_home: IsHome) -> None:
    host.put(HERE / "dying.py")
    host.gpupt("detach", "--all", "--yes")
    host.sh("rm -f /run/frozen")
    # The other card's lane goes on; with its second write no card is home yet.
    words = f"{PYTHON} {BENCH}/dying.py freeze 2 -- attach --all --yes"
    host.sh(f"setsid {words} > {BENCH}/frozen.log 2>&1 & ")
    host.sh("until test -e /run/frozen; do sleep 0.5; done", deadline=90)
    assert as_booted.differences(host.facts()) != ()
    host.reset()
    assert as_booted.differences(host.facts()) == (), "no binding outlives a reset"
    assert len(host.gpupt("status")["unfinished"]) == 1
    (found,) = [each for each in doctor(host)["orphan-override"] if each["severity"] == "fail"]
    assert "cut short" in found["brief"]
    host.gpupt("recover", "--yes")
    assert host.gpupt("status")["unfinished"] == []
    is_home()
    host.gpupt("detach", GPU, "--yes")
    host.gpupt("attach", GPU, "--yes")
