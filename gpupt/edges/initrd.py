"""Writes the small initrd that guests boot with: a static shell, the few modules that the
root disk needs, and nothing else; under emulation it saves seconds over a general one."""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Iterable
from pathlib import Path

from gpupt.edges.process import run
from gpupt.errors import Failed

# In this order; what the kernel has built in is left out.  crc32c before ext4, which asks
# for it by name; qemu_fw_cfg so that the credentials are there when systemd looks for them.
MODULES = ("crc32c-intel", "crc32c_generic", "virtio_pci", "virtio_blk", "ext4", "qemu_fw_cfg")
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t proc proc /proc
while read -r module; do /bin/busybox insmod "/modules/$module"; done </modules/order
root=/dev/vda
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; esac
done
tries=0
until [ -b "$root" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ]; then
        echo "gpupt initrd: no disk $root within 30 s" >/dev/console
        /bin/busybox poweroff -f
    fi
    /bin/busybox usleep 100000
done
/bin/busybox mount -t ext4 -o rw,noatime "$root" /root || /bin/busybox poweroff -f
/bin/busybox mount -o move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""


def write_initrd(tree: Path, target: Path) -> None:
    """Write the initrd for the newest kernel of that tree; raises Failed when the tree lacks
    the static shell or a module."""
    shell = tree / "usr/bin/busybox"
    if not shell.is_file():
        raise Failed("the baked tree has no static busybox, which its initrd needs")
    kernels = sorted((tree / "usr/lib/modules").glob("*/modules.dep"))
    if not kernels:
        raise Failed("the baked tree has no kernel modules")
    folder = kernels[-1].parent
    ordered = module_order(
        MODULES,
        dependencies=(folder / "modules.dep").read_text(),
        builtin=(folder / "modules.builtin").read_text(),
    )
    names = [path.rpartition("/")[2].partition(".ko")[0] + ".ko" for path in ordered]
    entries: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "root", "modules")
    ]
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, shell.read_bytes()))
    entries.append(("init", stat.S_IFREG | 0o755, _INIT.encode()))
    listing = "".join(f"{name}\n" for name in names).encode()
    entries.append(("modules/order", stat.S_IFREG | 0o644, listing))
    for path, name in zip(ordered, names, strict=True):
        content = read_module(folder / path)
        entries.append((f"modules/{name}", stat.S_IFREG | 0o644, content))
    target.write_bytes(gzip.compress(cpio(entries), compresslevel=6, mtime=0))


def module_order(wanted: Iterable[str], *, dependencies: str, builtin: str) -> tuple[str, ...]:
    """The wanted modules' files, each after those it depends on (modules.dep's own order is
    the reverse); built-in ones are left out.  Raises Failed for a module that is neither."""
    needs: dict[str, tuple[str, tuple[str, ...]]] = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[_module(path)] = (path, tuple(rest.split()))
    inside = {_module(line) for line in builtin.splitlines()}
    ordered: dict[str, None] = {}
    for name in wanted:
        key = name.replace("-", "_")
        if key in inside:
            continue
        if key not in needs:
            raise Failed(f"the kernel has no module {name}, which the root disk needs")
        path, below = needs[key]
        for one in (*reversed(below), path):
            ordered.setdefault(one)
    return tuple(ordered)


def read_module(path: Path) -> bytes:
    """A module's content, unpacked: the initrd is compressed as a whole."""
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            plain = path.parent / f".{path.stem}"
            run(["zstd", "-q", "-d", "-f", path, "-o", plain], deadline=60)
            try:
                return plain.read_bytes()
            finally:
                plain.unlink()
        case _:
            return path.read_bytes()


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A ``newc`` archive of (name, mode, content), owned by root, with no times in it
    (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    parts: list[bytes] = []
    number = 0
    for number, (name, mode, content) in enumerate((*entries, ("TRAILER!!!", 0, b"")), 1):
        raw = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        header = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + "".join(f"{value:08x}" for value in header).encode() + raw
        parts.append(head + b"\0" * (-len(head) % 4))
        parts.append(content + b"\0" * (-len(content) % 4))
    return b"".join(parts)


def _module(path: str) -> str:
    """A module's name from its path: hyphens and underscores are the same to the kernel."""
    return path.strip().rpartition("/")[2].partition(".ko")[0].replace("-", "_")
