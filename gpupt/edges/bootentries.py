"""Reads how a host boots: the tool that changes its kernel line, and the line as it will be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gpupt.edges.etc import Etc
from gpupt.model.preparation import Boot, BootTool, InstalledKernel

GRUB_CFG = "/boot/grub/grub.cfg"
GRUBENVS = ("/boot/grub2/grubenv", "/boot/efi/EFI/fedora/grubenv", "/boot/efi/EFI/redhat/grubenv")
# The Boot Loader Specification's entries, wherever the partition is mounted.
ENTRY_FOLDERS = ("/boot/loader/entries", "/efi/loader/entries", "/boot/efi/loader/entries")
# The boot loader's own account of itself (systemd's Boot Loader Interface).
LOADER_INFO = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
# Systems that have a way of their own, which gpupt does not go: a sign of each.
FOREIGN = (
    ("/run/ostree-booted", "it boots by OSTree: rpm-ostree kargs --append-if-missing=… adds words"),
    (
        "/etc/kernel/proxmox-boot-uuids",
        "it boots by proxmox-boot-tool: /etc/kernel/cmdline, then proxmox-boot-tool refresh",
    ),
    ("/etc/NIXOS", "it is NixOS: boot.kernelParams in its configuration adds words"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A boot entry: its file, the kernel's release, its words, and whether it has an initrd."""

    name: str
    release: str
    words: frozenset[str]
    initrd: bool


def read_boot(etc: Etc) -> Boot:
    """How the machine boots; a tool is named only where its entries can be read too."""
    for sign, why in FOREIGN:
        if etc.exists(sign):
            return Boot(None, why)
    loader = loader_info(etc)
    entries = read_entries(etc)
    grubby, update_grub = etc.program("grubby"), etc.program("update-grub")
    kernel_install = etc.program("kernel-install")
    by_systemd = loader.startswith("systemd-boot") or (
        not loader and grubby is None and not etc.exists(GRUB_CFG) and systemd_boot_installed(etc)
    )
    denied = [name for name in etc.denied if name.startswith(("/boot", "/efi"))]
    if by_systemd:
        kernels = tuple(kernels_of(etc, entries))
        if kernel_install and kernels and etc.exists("/etc/kernel/cmdline"):
            ours = {kernel.release for kernel in kernels}
            words = common_words(entry.words for entry in entries if entry.release in ours)
            why = "systemd-boot: /etc/kernel/cmdline and kernel-install"
            return Boot(BootTool.KERNEL_INSTALL, why, kernel_install, words, kernels)
        lacking = [
            name
            for name, there in (
                ("kernel-install", kernel_install),
                ("/etc/kernel/cmdline", etc.exists("/etc/kernel/cmdline")),
                ("a boot entry with its kernel's image", kernels),
            )
            if not there
        ]
        why = f"it boots by systemd-boot, and has not: {', '.join(lacking)}"
    elif grubby and entries:
        words = common_words(entry.words for entry in entries)
        return Boot(BootTool.GRUBBY, "grubby", grubby, words)
    elif update_grub and etc.exists("/etc/default/grub") and etc.exists(GRUB_CFG):
        text = etc.text(GRUB_CFG)
        if text is not None:
            # A file with no kernel in it was cut short: update-grub writes it anew.
            words = common_words(grub_lines(text)) or frozenset()
            return Boot(BootTool.UPDATE_GRUB, "GRUB: update-grub", update_grub, words)
        why = f"{GRUB_CFG} may not be read"
    else:
        why = "none of GRUB with update-grub, grubby, systemd-boot with kernel-install is set up"
    if denied:
        why = f"{denied[0]} may be read by root only"
    return Boot(None, why)


def entry_files(etc: Etc, tool: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that a tool writes, and the folders in which it adds and removes some."""
    if tool == BootTool.UPDATE_GRUB:
        return (GRUB_CFG,), ()
    folders = tuple(folder for folder in ENTRY_FOLDERS if etc.names(folder, ending=".conf"))[:1]
    if tool == BootTool.GRUBBY:
        return ("/etc/default/grub", "/etc/kernel/cmdline", *GRUBENVS), folders
    return (), folders


def loader_info(etc: Etc) -> str:
    """``systemd-boot 257``, ``GRUB 2.12``; empty where the boot loader says nothing."""
    raw = etc.raw(LOADER_INFO) or b""
    # Four bytes of attributes come first (Documentation/filesystems/efivarfs.rst).
    return raw[4:].decode("utf-16-le", errors="replace").rstrip("\0")


def systemd_boot_installed(etc: Etc) -> bool:
    """Whether systemd-boot lies in the EFI partition."""
    return any(
        name.rpartition("/")[2].startswith("systemd-boot")
        for partition in ("/boot", "/efi", "/boot/efi")
        for name in etc.names(f"{partition}/EFI/systemd", ending=".efi")
    )


def read_entries(etc: Etc) -> tuple[Entry, ...]:
    """The entries of the first folder that has some."""
    for folder in ENTRY_FOLDERS:
        names = etc.names(folder, ending=".conf")
        if names:
            common = kernelopts(etc)
            return tuple(read_entry(name, etc.text(name) or "", common) for name in names)
    return ()


def read_entry(name: str, text: str, common: str) -> Entry:
    """One entry; ``common`` stands for ``$kernelopts``."""
    held: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key and not key.startswith("#"):
            held.setdefault(key, []).append(value.strip())
    options = " ".join(held.get("options", [])).replace("$kernelopts", common)
    release = (held.get("version") or [""])[0]
    return Entry(name, release, frozenset(options.split()), "initrd" in held)


def kernelopts(etc: Etc) -> str:
    """What ``$kernelopts`` stands for in the entries of RHEL 8."""
    for name in GRUBENVS:
        for line in (etc.text(name) or "").splitlines():
            if line.startswith("kernelopts="):
                return line.removeprefix("kernelopts=")
    return ""


def kernels_of(etc: Etc, entries: Iterable[Entry]) -> Iterator[InstalledKernel]:
    """The kernels of the entries, as far as kernel-install can be given their images."""
    for release in sorted({entry.release for entry in entries} - {""}):
        for image in (f"/lib/modules/{release}/vmlinuz", f"/boot/vmlinuz-{release}"):
            if etc.exists(image):
                yield InstalledKernel(release, image)
                break


def grub_lines(text: str) -> Iterator[frozenset[str]]:
    """The kernel lines that update-grub made for this system: not those of other systems
    (os-prober), of memory tests, or for recovery, which GRUB_CMDLINE_LINUX_DEFAULT spares."""
    section = ""
    by_section = "### BEGIN /etc/grub.d/10_linux" in text
    for line in text.splitlines():
        words = line.split()
        if words[:2] == ["###", "BEGIN"]:
            section = words[2] if len(words) > 2 else ""
        if by_section and not section.startswith("/etc/grub.d/10_linux"):
            continue
        if words[:1] in (["linux"], ["linuxefi"], ["linux16"]) and len(words) > 1:
            held = frozenset(words[2:])
            if "memtest" not in words[1] and not held & {"single", "recovery"}:
                yield held


def common_words(lines: Iterable[frozenset[str]]) -> frozenset[str] | None:
    """The words that every line has; None: there is no line."""
    found = list(lines)
    return frozenset.intersection(*found) if found else None
