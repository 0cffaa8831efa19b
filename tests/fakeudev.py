"""What a reboot makes of a planted machine: drivers and overrides anew, our udev rules obeyed.

Knows the keys and the order of udev(7) that our rules use, and fails on any other."""

from __future__ import annotations

import re
from contextlib import suppress

from fakekernel import FakeKernel

from gpupt.errors import Failed
from gpupt.model.pci import PciAddress

KEY = re.compile(r'(?P<key>[A-Z]+)(?:\{(?P<attribute>[^}]+)\})?(?P<op>==|!=|=)"(?P<value>[^"]*)"')


def boot(kernel: FakeKernel) -> None:
    """Boot the machine again; udev comes to every function after the host's drivers did, the
    worst order there is."""
    folder = kernel.root / "sys/bus/pci/devices"
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        (folder / name / "driver_override").write_text("(null)\n")
        (folder / name / "driver").unlink(missing_ok=True)
    for name in names:
        kernel.probe(PciAddress.parse(name))
    rules = sorted((kernel.root / "etc/udev/rules.d").glob("*.rules"))
    for name in names:
        for file in rules:
            obey(file.read_text(), name, kernel=kernel)


def obey(rule: str, name: str, *, kernel: FakeKernel) -> None:
    """Carry out a rule's file for the ``add`` of a function."""
    lines = [line for line in rule.splitlines() if line and not line.startswith("#")]
    number = 0
    while number < len(lines):
        keys = list(KEY.finditer(lines[number]))
        assert ", ".join(key[0] for key in keys) == lines[number], f"no rule: {lines[number]}"
        number += 1
        label = None
        for key in sorted(keys, key=lambda each: each["op"] == "="):
            value = key["value"].replace("%k", name)
            if key["op"] == "=":
                if key["key"] == "GOTO":
                    label = value
                elif key["key"] == "IMPORT":
                    matches("IMPORT", key["attribute"], value, name, kernel)
                elif key["key"] == "ATTR":
                    assign(key["attribute"], value, name, kernel=kernel)
                else:
                    assert key["key"] == "LABEL", key[0]
            elif matches(key["key"], key["attribute"], value, name, kernel) != (key["op"] == "=="):
                label = None
                break
        if label is not None:
            number = lines.index(f'LABEL="{label}"', number)


def matches(key: str, attribute: str | None, value: str, name: str, kernel: FakeKernel) -> bool:
    """Whether a key has that value for a function."""
    place = (kernel.root / "sys/bus/pci/devices" / name).resolve()
    if key == "IMPORT":
        assert (attribute, value.split()[:2]) == ("builtin", ["kmod", "load"])
        # It is content where there is no such module, too.
        if not kernel.has_driver(value.split()[2]):
            with suppress(Failed):
                kernel.load_module(value.split()[2])
        return True
    if key == "TEST":
        under = kernel.root / value[1:] if value.startswith("/") else place / value
        if value.startswith("/sys/bus/pci/drivers/"):
            driver, _, function = value.removeprefix("/sys/bus/pci/drivers/").partition("/")
            # The planted tree has no links from a driver to its functions.
            return kernel.driver_of(function) == driver if function else under.exists()
        return under.exists()
    if key == "ATTR":
        assert attribute is not None
        file = place / attribute
        return file.exists() and file.read_text().strip() == value
    if key == "DEVPATH":
        return f"/{place.relative_to((kernel.root / 'sys').resolve())}" == value
    return {"ACTION": "add", "SUBSYSTEM": "pci", "KERNEL": name}[key] == value


def assign(attribute: str | None, value: str, name: str, *, kernel: FakeKernel) -> None:
    """Write one of the files that our rules write."""
    address = PciAddress.parse(name)
    if attribute == "driver_override":
        kernel.set_override(address, value)
    elif attribute == "driver/unbind":
        kernel.unbind(address, str(kernel.driver_of(value)))
    else:
        assert attribute == "subsystem/drivers_probe"
        kernel.probe(PciAddress.parse(value))
