"""The gate to libvirt: domains and networks read, defined, started and removed.

libvirt is the truth about domains: what is ours says so in its ``<metadata>``.  Every call
has a deadline, since a libvirtd that is stuck answers nothing.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Network
from typing import Any, TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree

from gpupt.edges.guests import guest_in
from gpupt.errors import BadInput, DeadlineExceeded, Failed, GpuptError
from gpupt.model.cluster import Capacity, Domain, Membership, Network, Role
from gpupt.model.facts import Guest
from gpupt.model.pci import PciAddress

NAMESPACE = "https://gpupt.dev/ns/1"
CONNECT_SECONDS = 30.0
CALL_SECONDS = 60.0
# Starting a domain maps and pins its whole memory, and resets its cards.
START_SECONDS = 600.0
Answer = TypeVar("Answer")


# What gpupt's domains run on, and the driver that pretends to run them.
DRIVERS = frozenset({"qemu", "test"})
DAEMONS = ("libvirtd", "virtqemud")


def no_uri(uri: str, why: str) -> BadInput:
    """The error for a word that libvirt takes for no URI."""
    return BadInput(
        f"{uri!r} is no URI that gpupt can use",
        details=why,
        remedy="give --connect one such as qemu:///system or qemu+ssh://root@HOST/system",
    )


def what_to_do(uri: str) -> str:
    """The remedy when libvirt cannot be reached at ``uri``: not installed is not stopped."""
    host = urlsplit(uri).hostname
    if host is not None:
        return f"see that libvirt runs on {host} and lets you in, and check --connect"
    places = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if not any(shutil.which(daemon, path=places) for daemon in DAEMONS):
        return "libvirt is not installed here: ./quickstart --setup-only host installs it"
    return (
        "systemctl start libvirtd (or virtqemud), run gpupt as root or as a member of the "
        "group libvirt, and check --connect if you gave it"
    )


class Hypervisor:
    """One connection to libvirt."""

    def __init__(self, connection: Any, *, uri: str, patience: float = CALL_SECONDS) -> None:
        self._connection = connection
        self.patience = patience
        self._late: threading.Thread | None = None
        self.uri = uri

    @classmethod
    def connect(cls, uri: str, *, deadline: float = CONNECT_SECONDS) -> Hypervisor:
        """A connection to ``uri`` within ``deadline`` seconds.

        Raises BadInput for what is no URI of libvirt's, Failed with what to do.
        """
        driver, colon, _ = uri.partition(":")
        if colon and driver.partition("+")[0] not in DRIVERS:
            raise no_uri(uri, f"no connection driver {driver!r}")
        try:
            import libvirt
        except ImportError as error:
            raise Failed(
                "libvirt's Python binding is not installed",
                details=str(error),
                remedy="pip install libvirt-python, or apt install python3-libvirt",
            ) from None
        # libvirt prints every error to stderr by itself unless told not to.
        libvirt.registerErrorHandler(lambda *_: None, None)
        remedy = what_to_do(uri)
        try:
            connection = _within(deadline, f"libvirt at {uri}", lambda: libvirt.open(uri))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_CONNECT:
                raise no_uri(uri, str(error)) from None
            raise Failed(
                f"cannot reach libvirt at {uri}", details=str(error), remedy=remedy
            ) from None
        except DeadlineExceeded as error:
            raise DeadlineExceeded(
                f"libvirt at {uri} did not answer within {deadline:g} s",
                details=error.details,
                remedy=remedy,
            ) from None
        return cls(connection, uri=uri, patience=min(deadline, CALL_SECONDS) * 2)

    def close(self) -> None:
        """End the connection."""
        with suppress(GpuptError):
            self._call("close the connection", self._connection.close)

    def __enter__(self) -> Hypervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def capacity(self) -> Capacity:
        """The machine's CPUs and memory."""
        info = self._call("read the machine's size", self._connection.getInfo)
        cpus, memory, numa_nodes = int(info[2]), int(info[1]) << 20, int(info[4])
        try:
            stats = self._call(
                "read the machine's memory", lambda: self._connection.getMemoryStats(-1, 0)
            )
        except Failed:
            # The test driver has no statistics.
            return Capacity(cpus, memory, available=memory, numa_nodes=numa_nodes)
        free = sum(int(stats.get(name, 0)) for name in ("free", "buffers", "cached"))
        return Capacity(cpus, memory, available=min(free << 10, memory), numa_nodes=numa_nodes)

    def domains(self) -> tuple[Domain, ...]:
        """Every domain, running or not, by name."""
        found = self._call("list domains", lambda: self._connection.listAllDomains(0))
        read = [self._read(self._domain_of, each) for each in found]
        return tuple(sorted((each for each in read if each), key=lambda each: each.name))

    def guests(self) -> tuple[Guest, ...]:
        """Every domain that has PCI functions of the host, anybody's, by name."""
        found = self._call("list domains", lambda: self._connection.listAllDomains(0))
        read = [self._read(self._guest_of, each) for each in found]
        return tuple(sorted((each for each in read if each), key=lambda each: each.name))

    def domain(self, name: str) -> Domain | None:
        """The domain of that name; None when there is none."""
        handle = self._find_domain(name)
        return None if handle is None else self._read(self._domain_of, handle)

    def networks(self) -> tuple[Network, ...]:
        """Every network, active or not, by name."""
        found = self._call("list networks", lambda: self._connection.listAllNetworks(0))
        read = [self._read(self._network_of, each) for each in found]
        return tuple(sorted((each for each in read if each), key=lambda each: each.name))

    def start_network(self, xml: str) -> None:
        """Define a network from validated XML and start it."""
        import libvirt

        flags = getattr(libvirt, "VIR_NETWORK_DEFINE_VALIDATE", 1)
        network = self._call(
            "define the network", lambda: self._connection.networkDefineXMLFlags(xml, flags)
        )
        try:
            if not self._call("read the network", network.isActive):
                self._call(f"start network {network.name()}", network.create)
        except GpuptError:
            with suppress(GpuptError):
                self._call("remove the network", network.undefine)
            raise

    def remove_network(self, name: str) -> None:
        """Stop and undefine the network; nothing to do when there is none."""
        try:
            network = self._call(
                f"find network {name}", lambda: self._connection.networkLookupByName(name)
            )
        except Absent:
            return
        if self._call(f"read network {name}", network.isActive):
            self._call(f"stop network {name}", network.destroy)
        if self._call(f"read network {name}", network.isPersistent):
            self._call(f"remove network {name}", network.undefine)

    def start_domain(self, xml: str) -> None:
        """Define a domain from XML that libvirt validates against its schema, and start it.

        A domain that does not start is not left defined.  Raises Failed.
        """
        import libvirt

        domain = self._call(
            "define the domain",
            lambda: self._connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE),
        )
        try:
            self._call(f"start {domain.name()}", domain.create, deadline=START_SECONDS)
        except BaseException:
            with suppress(GpuptError):
                self.remove_domain(domain.name(), patience=0)
            raise

    def remove_domain(self, name: str, *, patience: float) -> bool:
        """Shut a domain down within ``patience`` seconds, by force after that, and undefine it.

        Nothing to do when there is none.  Returns whether it went down by itself.
        """
        import libvirt

        domain = self._find_domain(name)
        if domain is None:
            return True
        gently = True
        if self._call(f"read {name}", domain.isActive):
            gently = patience > 0 and self._shut_down(domain, name, patience)
            if not gently:
                with suppress(Absent):
                    self._call(f"end {name}", domain.destroy)
        flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        with suppress(Absent):
            if self._call(f"read {name}", domain.isPersistent):
                self._call(f"remove {name}", lambda: domain.undefineFlags(flags))
        return gently

    def press_power(self, name: str) -> None:
        """Ask a guest to power off, and do not wait; nothing to do when it does not run."""
        domain = self._find_domain(name)
        with suppress(Failed):
            if domain is not None and self._call(f"read {name}", domain.isActive):
                self._call(f"shut {name} down", domain.shutdown)

    def reset(self, name: str) -> None:
        """Press a running guest's reset button; raises Failed."""
        domain = self._find_domain(name)
        if domain is None:
            raise Failed(f"there is no domain {name}")
        self._call(f"reset {name}", domain.reset)

    def _shut_down(self, domain: Any, name: str, patience: float) -> bool:
        """Ask the guest to power off; whether it did so in time."""
        end = time.monotonic() + patience
        with suppress(Failed):
            self._call(f"shut {name} down", domain.shutdown)
            while time.monotonic() < end:
                if not self._call(f"read {name}", domain.isActive):
                    return True
                time.sleep(0.2)
        return False

    def _find_domain(self, name: str) -> Any:
        try:
            return self._call(f"find {name}", lambda: self._connection.lookupByName(name))
        except Absent:
            return None

    def _read(self, read: Callable[[Any], Answer], handle: Any) -> Answer | None:
        """What is read of a handle; None when it went away meanwhile."""
        try:
            return self._call("read libvirt's state", lambda: read(handle))
        except Absent:
            return None

    @staticmethod
    def _domain_of(handle: Any) -> Domain:
        # The XML of a running domain lacks nothing we ask for; inactive ones have only one.
        root = ElementTree.fromstring(handle.XMLDesc(0))
        return Domain(
            name=handle.name(),
            uuid=handle.UUIDString(),
            running=bool(handle.isActive()),
            membership=membership_in(root),
            hostdevs=_hostdevs_in(root),
            type=root.get("type", ""),
        )

    @staticmethod
    def _guest_of(handle: Any) -> Guest | None:
        return guest_in(ElementTree.fromstring(handle.XMLDesc(0)))

    @staticmethod
    def _network_of(handle: Any) -> Network:
        root = ElementTree.fromstring(handle.XMLDesc(0))
        element = root.find(f"metadata/{{{NAMESPACE}}}network")
        bridge = root.find("bridge")
        return Network(
            name=handle.name(),
            active=bool(handle.isActive()),
            bridge=None if bridge is None else bridge.get("name"),
            subnets=tuple(_subnets_in(root)),
            cluster=None if element is None else element.get("cluster"),
        )

    def _call(
        self, what: str, function: Callable[[], Answer], *, deadline: float | None = None
    ) -> Answer:
        """The answer of one call to libvirt; raises Absent, Failed, DeadlineExceeded.

        A call that was given up (Ctrl-C, deadline) may still be at work in libvirt: the next
        one waits for it, so that undoing never overtakes doing.
        """
        import libvirt

        deadline = self.patience if deadline is None else deadline
        if self._late is not None:
            self._late.join(deadline)
            if self._late.is_alive():
                raise DeadlineExceeded(f"libvirt at {self.uri} is stuck in an earlier call")
            self._late = None

        def keep(thread: threading.Thread) -> None:
            self._late = thread

        try:
            return _within(deadline, f"libvirt: {what}", function, on_late=keep)
        except libvirt.libvirtError as error:
            if error.get_error_code() in {
                libvirt.VIR_ERR_NO_DOMAIN,
                libvirt.VIR_ERR_NO_NETWORK,
            } or (
                error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
                and "not running" in str(error)
            ):
                raise Absent(f"libvirt could not {what}", details=_lines(str(error))) from None
            raise Failed(f"libvirt could not {what}", details=_lines(str(error))) from None


class Absent(Failed):
    """What was asked for is not there, or not any more."""


def membership_in(root: ElementTree.Element) -> Membership | None:
    """What a domain's XML says of its membership; None when it says nothing we can read."""
    node = root.find(f"metadata/{{{NAMESPACE}}}node")
    if node is None:
        return None
    try:
        return Membership(
            cluster=node.attrib["cluster"],
            node=node.attrib["name"],
            role=Role(node.attrib["role"]),
            image=node.attrib["image"],
            spec=node.attrib["spec"],
            gpus=tuple(PciAddress.parse(text) for text in node.get("gpus", "").split()),
        )
    except (KeyError, ValueError, BadInput):
        return None


def _hostdevs_in(root: ElementTree.Element) -> tuple[PciAddress, ...]:
    found = []
    for address in root.iterfind("devices/hostdev[@type='pci']/source/address"):
        numbers = [
            int(address.get(part) or "0", 0) for part in ("domain", "bus", "slot", "function")
        ]
        found.append(PciAddress(*numbers))
    return tuple(found)


def _subnets_in(root: ElementTree.Element) -> list[IPv4Network]:
    found = []
    for ip in root.iterfind("ip"):
        if ip.get("family", "ipv4") != "ipv4" or ip.get("address") is None:
            continue
        mask = ip.get("prefix") or ip.get("netmask") or "32"
        with suppress(ValueError):
            found.append(IPv4Network(f"{ip.get('address')}/{mask}", strict=False))
    return found


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line.strip())


def _within(
    deadline: float,
    what: str,
    function: Callable[[], Answer],
    *,
    on_late: Callable[[threading.Thread], None] = lambda thread: None,
) -> Answer:
    """The answer of a call that may hang, in a thread of its own; raises what it raises, or
    DeadlineExceeded.  ``on_late`` gets the thread that was left at work."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((function(), None))
        except BaseException as error:  # noqa: BLE001 (the caller raises it)
            answers.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name=what)
    thread.start()
    try:
        answer, error = answers.get(timeout=deadline)
    except queue.Empty:
        on_late(thread)
        raise DeadlineExceeded(f"{what}: no answer within {deadline:g} s") from None
    except BaseException:
        on_late(thread)
        raise
    if error is not None:
        raise error
    result: Answer = answer
    return result
