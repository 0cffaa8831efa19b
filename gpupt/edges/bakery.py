"""The worker that bakes one layer or one image, in namespaces of its own.

``python -m gpupt.edges.bakery ORDER`` is started by edges/bake.py through ``unshare``: the
kernel ends its processes and takes its mounts away with it, even after a SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpupt.edges import chroot
from gpupt.edges.ansible import apply_role
from gpupt.edges.initrd import write_initrd
from gpupt.edges.process import Completed, failure, run, stream
from gpupt.edges.sources import proxies_for_apt
from gpupt.errors import Failed, GpuptError

SAY, WRONG = "say ", "wrong "
ENVIRONMENT = "/opt/gpupt/env"  # the Python environment that a node's rolls add to
OWN_ENVIRONMENT = "/opt/gpupt/venv"  # gpupt's own, on a host
SOURCES = "/var/tmp/sources"  # where a role finds its Debian sources; not kept
_DEADLINE = 3600


@dataclass(frozen=True, slots=True)
class Order:
    """What to bake.  ``folder`` is the unfinished result; ``below`` are the trees under it,
    topmost first; everything is text so that it travels as JSON."""

    kind: str
    roll: str
    folder: str
    below: tuple[str, ...]
    rolls_folder: str
    packages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    lock: str | None = None
    suite: str = ""
    architecture: str = ""
    mirror: str | None = None
    find_links: tuple[str, ...] = ()
    certificates: str | None = None
    uv: str = ""
    wheels: str = ""
    debs: str = ""
    wheel: str | None = None
    slack: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(text).items()
        }
        return cls(**given)


def main(argv: list[str]) -> int:
    """Carry out the order in the file named; narrates on stdout, a line each."""
    order = Order.from_json(Path(argv[0]).read_text())
    try:
        with (Path(order.folder) / "bake.log").open("a") as log:

            def note(line: str) -> None:
                log.write(line + "\n")
                log.flush()

            if order.kind == "image":
                bake_image_files(order, note)
            else:
                bake_layer(order, note)
    except GpuptError as error:
        wrong = {"brief": error.brief, "details": error.details, "remedy": error.remedy}
        print(WRONG + json.dumps(wrong), flush=True)
        return 1
    return 0


def bake_layer(order: Order, note: Callable[[str], None]) -> None:
    """Bake ``order.folder``/root: packages, wheels, then the role; nothing else stays."""
    folder = Path(order.folder)
    root = folder / "root"
    root.mkdir()
    with ExitStack() as stack:
        if order.below:
            for name in ("work", "merged"):
                (folder / name).mkdir()
            tree = stack.enter_context(
                chroot.overlay(
                    [Path(path) for path in order.below],
                    upper=root,
                    work=folder / "work",
                    merged=folder / "merged",
                )
            )
        else:
            tree = root
            with _phase(order, f"Debian {order.suite} by mmdebstrap"):
                _bootstrap(order, tree, note)
        with chroot.ready(tree), _bench(order, tree):
            if order.below and order.packages:
                with _phase(order, f"{len(order.packages)} Debian packages and what they need"):
                    _install_packages(order, tree, note)
            if order.sources:
                with _phase(order, f"source of {', '.join(order.sources)}"):
                    _fetch_sources(order, tree, note)
            if order.lock or order.wheel:
                with _phase(order, "Python distributions"):
                    _install_python(order, tree, note)
            role = Path(order.rolls_folder) / order.roll / "tasks/main.yml"
            if role.is_file():
                with _phase(order, "role"):
                    _apply(order, tree, note)
        _tidy(tree)
    for name in ("work", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)


def bake_image_files(order: Order, note: Callable[[str], None]) -> None:
    """Write disk.qcow2, vmlinuz and initrd into ``order.folder`` from the stack of trees."""
    folder = Path(order.folder)
    with ExitStack() as stack:
        if len(order.below) > 1:
            merged = folder / "merged"
            merged.mkdir()
            lower = [Path(path) for path in order.below]
            tree = stack.enter_context(chroot.overlay_readonly(lower, merged=merged))
        else:
            tree = Path(order.below[0])
        kernels = sorted((tree / "boot").glob("vmlinuz-*"))
        if not kernels:
            raise Failed("the baked tree has no kernel", details="looked for /boot/vmlinuz-*")
        shutil.copyfile(kernels[-1], folder / "vmlinuz")
        write_initrd(tree, folder / "initrd")
        for name in ("vmlinuz", "initrd"):
            (folder / name).chmod(0o644)
        raw = folder / "disk.raw"
        with _phase(order, "file system"):
            size = _tree_size(tree) + order.slack
            with raw.open("wb") as file:
                file.truncate(size)
            # The inode tables are written now: the guest need not do it behind its back.
            extended = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
            words = ["mkfs.ext4", "-q", "-F", "-L", "gpupt", "-m", "0", "-E", extended]
            _logged([*words, "-J", "size=16", "-d", tree, raw], note=note)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    with _phase(order, "qcow2"):
        target = folder / "disk.qcow2"
        _logged(["qemu-img", "convert", "-O", "qcow2", "-W", raw, target], note=note)
        target.chmod(0o644)
        raw.unlink()


@contextmanager
def _phase(order: Order, what: str) -> Iterator[None]:
    """Say what begins, and how long it took when it is done."""
    print(f"{SAY}{order.roll}: {what} …", flush=True)
    start = time.monotonic()
    yield
    print(f"{SAY}{order.roll}: {what}: {time.monotonic() - start:.1f} s", flush=True)


def _bootstrap(order: Order, tree: Path, note: Callable[[str], None]) -> None:
    words: list[str | Path] = [
        "mmdebstrap",
        "--variant=minbase",
        "--format=directory",
        f"--architectures={order.architecture}",
        f"--include={','.join(order.packages)}",
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/info/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/lintian/*",
    ]
    words += [order.suite, tree]
    if order.mirror:
        # An address alone: mmdebstrap makes the line, and on a machine that is not Debian names
        # Debian's keys in it.
        words.append(order.mirror)
    tree.rmdir()
    _logged(words, note=note, environment=proxies_for_apt(os.environ))


@contextmanager
def _bench(order: Order, tree: Path) -> Iterator[None]:
    """Lay out what the bake uses under /run/bake: uv, wheels, packages, the roll's files."""
    bench = tree / chroot.BENCH.lstrip("/")
    with ExitStack() as stack:
        roll = Path(order.rolls_folder) / order.roll
        stack.enter_context(chroot.bind(roll, bench / "roll", read_only=True))
        stack.enter_context(chroot.bind(Path(order.uv), bench / "uv", read_only=True))
        stack.enter_context(chroot.bind(Path(order.wheels), bench / "wheels"))
        for name in ("lists", "archives"):
            target = {"lists": "var/lib/apt/lists", "archives": "var/cache/apt/archives"}[name]
            source = Path(order.debs) / name
            (source / "partial").mkdir(parents=True, exist_ok=True)
            stack.enter_context(chroot.bind(source, tree / target))
        if order.certificates:
            source = Path(order.certificates)
            stack.enter_context(chroot.bind(source, bench / "certificates.crt", read_only=True))
        if order.wheel:
            source = Path(order.wheel)
            stack.enter_context(chroot.bind(source, bench / source.name, read_only=True))
        for number, link in enumerate(order.find_links):
            if Path(link).is_dir():
                target_folder = bench / f"links{number}"
                stack.enter_context(chroot.bind(Path(link), target_folder, read_only=True))
        yield


def _install_packages(order: Order, tree: Path, note: Callable[[str], None]) -> None:
    install = ["install", "--no-install-recommends", *order.packages]
    for words in (["update"], install):
        _apt(order, tree, words, note=note)


def _fetch_sources(order: Order, tree: Path, note: Callable[[str], None]) -> None:
    """Unpack Debian's sources below SOURCES, from where the packages came; apt checks them."""
    folder = tree / SOURCES.lstrip("/")
    folder.mkdir()
    packages = (tree / "etc/apt/sources.list").read_text().splitlines()
    listed = tree / "etc/apt/sources.list.d/bake.list"
    listed.write_text("".join(f"deb-src {line[4:]}\n" for line in packages if line[:4] == "deb "))
    try:
        _apt(order, tree, ["update"], note=note)
        _apt(order, tree, ["source", *order.sources], note=note, folder=SOURCES)
    finally:
        listed.unlink()


def _apt(
    order: Order,
    tree: Path,
    words: list[str],
    *,
    note: Callable[[str], None],
    folder: str = "/",
) -> None:
    apt: list[str] = ["env", f"--chdir={folder}", "apt-get", "-q", "-y"]
    apt += ["-o", "APT::Sandbox::User=root", "-o", "Dpkg::Use-Pty=0", "-o", "Acquire::Retries=3"]
    if order.certificates:
        apt += ["-o", f"Acquire::https::CaInfo={chroot.BENCH}/certificates.crt"]
    _inside(tree, [*apt, *words], note=note, environment=proxies_for_apt(os.environ))


def _install_python(order: Order, tree: Path, note: Callable[[str], None]) -> None:
    """Install the roll's lock, every file checked against its hash; gpupt's wheel after it."""
    uv = f"{chroot.BENCH}/uv"
    environment = OWN_ENVIRONMENT if order.wheel else ENVIRONMENT
    if not (tree / environment.lstrip("/") / "bin/python").exists():
        system = ["--system-site-packages"] if order.wheel else []
        words = [uv, "venv", "-q", *system, "--python", "/usr/bin/python3", environment]
        _inside(tree, words, note=note)
    install = [uv, "pip", "install", "--python", f"{environment}/bin/python", "--compile-bytecode"]
    for number, link in enumerate(order.find_links):
        if Path(link).is_dir():
            install += ["--find-links", f"{chroot.BENCH}/links{number}"]
    if order.lock:
        lock = ["--require-hashes", "-r", f"{chroot.BENCH}/roll/{order.lock}"]
        try:
            # From uv's cache alone first: asked over the network, an index that states no
            # lifetime of its files has uv fetch and build what it already holds.
            _inside(tree, [*install, "--offline", *lock], note=note)
        except Failed:
            _inside(tree, [*install, *lock], note=note)
    if order.wheel:
        name = Path(order.wheel).name
        _inside(tree, [*install, "--no-deps", f"{chroot.BENCH}/{name}"], note=note)
    # Sources that were unpacked and built stay with uv under a new name each time, a gigabyte
    # for Spark; the layer is what keeps their result.
    for built in (tree / chroot.BENCH.lstrip("/") / "wheels").glob("sdists-v*"):
        shutil.rmtree(built, ignore_errors=True)
    _inside(tree, [uv, "cache", "prune", "-q"], note=note)


def _apply(order: Order, tree: Path, note: Callable[[str], None]) -> None:
    changed = apply_role(
        order.roll,
        tree=tree,
        rolls=Path(order.rolls_folder),
        variables={"gpupt_environment": ENVIRONMENT},
        deadline=_DEADLINE,
        log=note,
    )
    note(f"role {order.roll}: {changed} tasks changed something")


def _inside(
    tree: Path,
    words: list[str],
    *,
    note: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program in the tree with a small environment, ``environment`` laid over it."""
    given = {key: value for key, value in os.environ.items() if key.startswith("UV_")}
    given |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    given |= {
        "UV_CACHE_DIR": f"{chroot.BENCH}/wheels",
        "UV_LINK_MODE": "copy",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_NO_PROGRESS": "1",
        "DEBIAN_FRONTEND": "noninteractive",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }
    if (tree / chroot.BENCH.lstrip("/") / "certificates.crt").exists():
        given["SSL_CERT_FILE"] = f"{chroot.BENCH}/certificates.crt"
    given |= environment or {}
    # What is kept goes by the environment, not on argv: an index's address may hold a secret.
    unset = [word for key in os.environ if key not in given for word in ("-u", key)]
    _logged(["env", *unset, "chroot", tree, *words], note=note, environment=given)


def _logged(
    words: Sequence[str | Path],
    *,
    note: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program with its output in the log; raises Failed with the end of it."""
    shown = " ".join(str(word) for word in words)
    note(f"+ {shown}")
    tail: list[str] = []

    def keep(line: str) -> None:
        note(line)
        tail.append(line)
        del tail[:-12]

    status = stream(words, deadline=_DEADLINE, on_line=keep, environment=environment)
    if status != 0:
        raise failure(Completed(tuple(str(word) for word in words), status, "", "\n".join(tail)))


def _tidy(tree: Path) -> None:
    """Remove what installing leaves behind and no node needs."""
    patterns = (
        "var/log/*.log",
        "var/log/apt/*",
        "var/cache/debconf/*-old",
        "var/cache/ldconfig/aux-cache",
        "var/cache/apt/*.bin",
        "var/lib/dpkg/*-old",
        "var/tmp/*",
        "root/.cache",
        "root/.ansible",
    )
    for pattern in patterns:
        for path in tree.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    # systemd redoes what depends on /usr at a boot that finds these older than /usr.
    for name in ("etc", "var"):
        stamp = tree / name / ".updated"
        stamp.touch()


def _tree_size(tree: Path) -> int:
    """Bytes of an ext4 that holds the tree, rounded up to a MiB, with its own metadata."""
    out = run(["du", "-s", "-x", "--block-size=1", tree], deadline=600).stdout
    taken = int(out.split()[0])
    return (taken + taken // 10 + (96 << 20)) >> 20 << 20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
