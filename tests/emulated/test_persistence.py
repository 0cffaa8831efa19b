"""Loans over a reboot, with the real udev: what FakeKernel and fakeudev claim, proved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from emulatedhost import Host

pytestmark = pytest.mark.emulated
GPU, CARD, SOUND = "0000:01:00.0", "0000:02:00.0", "0000:02:00.1"
RULES = "/etc/udev/rules.d"
# udev looks for new rules every three seconds only, and would not have seen this one yet.
TRIGGER = (
    "udevadm control --reload;"
    f" udevadm trigger --action=add /sys/bus/pci/devices/{CARD} /sys/bus/pci/devices/{SOUND};"
    " udevadm settle --timeout=60"
)
IsHome = Callable[[], None]


def test_a_reboot_takes_the_card_again_and_a_renumbered_one_not(
    host: Host, is_home: IsHome
) -> None:
    done = host.gpupt("detach", "--persist", GPU, CARD, "--yes")
    assert [each["kind"] for each in done["actions"]].count("PersistLoan") == 2
    assert host.gpupt("detach", "--persist", GPU, CARD, "--yes")["actions"] == []
    # As if this card had been in another slot: its rule names one behind another root bus.
    rule = f"{RULES}/10-gpupt-{CARD}.rules"
    host.sh(f"sed -i 's|/devices/pci0000:00/|/devices/pci0000:40/|' {rule} && sync")
    host.reset()
    host.sh("udevadm settle --timeout=60")
    assert host.driver("01:00.0") == "vfio-pci"
    assert (host.driver("02:00.0"), host.driver("02:00.1")) == ("bochs-drm", "snd_hda_intel")
    gpus = {each["address"]: each for each in host.gpupt("list")["gpus"]}
    assert (gpus[GPU]["state"], gpus[CARD]["state"]) == ("detached", "host")
    assert gpus[GPU]["driver_override"] == "vfio-pci"
    assert gpus[CARD]["driver_override"] is None
    assert [gpus[each]["persistent"] for each in (GPU, CARD)] == [True, True]
    # It is a rule for another slot: detach puts it right, attach removes both.
    again = host.gpupt("detach", "--persist", CARD, "--dry-run")
    assert [each["kind"] for each in again["actions"]][-1] == "PersistLoan"
    host.gpupt("attach", "--all", "--yes")
    assert host.sh(f"ls -A {RULES} | grep gpupt || true").stdout == ""
    is_home()


def test_an_event_now_does_what_a_boot_does(host: Host, is_home: IsHome) -> None:
    """A driver has the card before udev comes to it: what the initramfs or a twin's event does."""
    host.gpupt("detach", "--persist", CARD, "--yes")
    for address in (CARD, SOUND):
        place = f"/sys/bus/pci/devices/{address}"
        host.sh(f"echo > {place}/driver_override; echo {address} > {place}/driver/unbind")
        host.sh(f"echo {address} > /sys/bus/pci/drivers_probe")
    assert (host.driver("02:00.0"), host.driver("02:00.1")) == ("bochs-drm", "snd_hda_intel")
    host.sh(TRIGGER)
    assert (host.driver("02:00.0"), host.driver("02:00.1")) == ("vfio-pci", "vfio-pci")
    host.gpupt("attach", CARD, "--yes")
    host.sh(TRIGGER)
    is_home()


def test_a_read_only_etc_is_told_before_anything_is_touched(host: Host, is_home: IsHome) -> None:
    host.sh(f"mkdir -p {RULES} && mount -t tmpfs -o ro none {RULES}")
    try:
        done = host.run("gpupt", "detach", "--persist", GPU, "--yes", check=False)
    finally:
        host.sh(f"umount {RULES}")
    assert done.status == 3
    assert "mounted read-only" in done.stderr
    is_home()
