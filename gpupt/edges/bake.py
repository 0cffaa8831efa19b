"""Bakes layers and images: each into a temporary name, renamed when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TextIO

from gpupt.edges.bakery import SAY, WRONG, Order
from gpupt.edges.images import (
    find_image,
    images_folder,
    layer_trees,
    layers_folder,
    write_image,
)
from gpupt.edges.process import run, stream
from gpupt.edges.resources import resource_folder
from gpupt.edges.rolls import folder_digest
from gpupt.edges.sources import SUITE, Sources, architecture, read_sources
from gpupt.edges.wheel import pack_wheel, source_digest
from gpupt.errors import DeadlineExceeded, Failed, Refused
from gpupt.model.roll import SELF, Ground, Image, Layer, Roll

Narrate = Callable[[str], None]
SLACK = 4 << 30  # room that a node has on its disk beyond what was baked
_DEADLINE = 2 * 3600
_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}


def bake_image(
    layers: tuple[Layer, ...],
    digest: str,
    *,
    rolls: Mapping[str, Roll],
    state: Path,
    narrate: Narrate,
    mirror: str | None = None,
) -> Image:
    """The image of those layers, baked as far as it is not there yet.

    Raises Refused when the machine cannot bake, Failed with the end of a step's output.
    """
    found = find_image(state, digest)
    if found is not None:
        return found
    check_machine()
    with baking(state, narrate):
        found = find_image(state, digest)  # another gpupt may have baked it while we waited
        if found is not None:
            return found
        _bake_missing(layers, rolls=rolls, state=state, narrate=narrate, mirror=mirror)
        trees = layer_trees(state, layers)
        return _bake_disk(digest, layers, trees, state=state, narrate=narrate)


def bake_layers(
    layers: tuple[Layer, ...],
    *,
    rolls: Mapping[str, Roll],
    state: Path,
    narrate: Narrate,
    mirror: str | None = None,
) -> tuple[str, ...]:
    """Bake those of the layers that are not there; returns their rolls.  Raises as
    ``bake_image`` does."""
    check_machine()
    with baking(state, narrate):
        return _bake_missing(layers, rolls=rolls, state=state, narrate=narrate, mirror=mirror)


def read_ground() -> Ground:
    """What the layers baked by this gpupt on this machine stand on."""
    return Ground(architecture(), SUITE, source_digest())


def check_machine() -> None:
    """Refuse, before anything is touched, what this machine cannot do."""
    if os.geteuid() != 0:
        raise Refused("baking images needs root", remedy="run it with sudo")
    missing = sorted({p for tool, p in _PROGRAMS.items() if shutil.which(tool) is None})
    if missing:
        raise Refused(
            "programs that baking needs are missing",
            details=", ".join(missing),
            remedy=f"apt-get install {' '.join(missing)}",
        )


def check_unchanged(roll: Roll, folder: Path) -> None:
    """Raise Failed when a roll's files are no longer those its digest was made from: the
    layer baked meanwhile would bear a wrong name."""
    if folder_digest(folder) != roll.digest:
        raise Failed(
            f"the roll {roll.name} was changed while it was being baked",
            details=f"in {folder}",
            remedy="build the image again",
        )


def find_uv() -> Path:
    """The uv that was installed with gpupt, else the one on PATH; raises Failed."""
    beside = Path(sys.executable).parent / "uv"
    if beside.is_file():
        return beside
    try:
        for file in distribution("uv").files or ():
            if file.name == "uv":
                return Path(str(file.locate())).resolve()
    except PackageNotFoundError:
        pass
    on_path = shutil.which("uv")
    if on_path:
        return Path(on_path)
    raise Failed(
        "uv is not installed, and baking images needs it",
        remedy="install gpupt with its extra: pip install 'gpupt[images]'",
    )


@contextmanager
def baking(state: Path, narrate: Narrate, *, patience: float = _DEADLINE) -> Iterator[None]:
    """One bake at a time for each state folder; says so when it waits for another.

    Raises Failed where the folder may not be written.
    """
    with _open_lock(layers_folder(state) / ".lock") as lock:
        end = time.monotonic() + patience
        said = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                other = lock.read().strip() or "unknown"
                if not said:
                    narrate(f"waiting for the bake of process {other} to end")
                    said = True
                if time.monotonic() > end:
                    raise DeadlineExceeded(
                        f"the bake of process {other} did not end within {patience:g} s"
                    ) from None
                time.sleep(0.5)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _open_lock(file: Path) -> TextIO:
    """The lock file, made where there is none; raises Failed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a+")
    except OSError as error:
        raise Failed(
            f"{file.parent} cannot be written",
            details=error.strerror or str(error),
            remedy="run gpupt as root, or name a folder of yours with --state",
        ) from None


def _bake_missing(
    layers: tuple[Layer, ...],
    *,
    rolls: Mapping[str, Roll],
    state: Path,
    narrate: Narrate,
    mirror: str | None,
) -> tuple[str, ...]:
    _remove_halves(state)
    sources: Sources | None = None
    trees: list[Path] = []
    baked = []
    for layer in layers:
        tree = layers_folder(state) / layer.digest / "root"
        if tree.is_dir():
            narrate(f"{layer.roll}: layer {layer.digest} is there")
        else:
            sources = sources or read_sources(mirror=mirror)
            _bake_layer(
                layer,
                rolls[layer.roll],
                below=tuple(trees),
                state=state,
                sources=sources,
                narrate=narrate,
            )
            baked.append(layer.roll)
        trees.insert(0, tree)
    return tuple(baked)


def _bake_layer(
    layer: Layer,
    roll: Roll,
    *,
    below: tuple[Path, ...],
    state: Path,
    sources: Sources,
    narrate: Narrate,
) -> None:
    for name in ("wheels", "debs"):
        (state / name).mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with _half(layers_folder(state) / layer.digest) as folder:
        wheel: str | None = None
        if roll.name == SELF:
            wheel = str(pack_wheel(folder))
        order = Order(
            kind="layer",
            roll=roll.name,
            folder=str(folder),
            below=tuple(str(path) for path in below),
            rolls_folder=str(resource_folder("rolls")),
            packages=roll.packages,
            sources=roll.sources,
            lock=roll.lock,
            suite=SUITE,
            architecture=architecture(),
            mirror=sources.mirror,
            find_links=sources.find_links,
            certificates=str(sources.certificates) if sources.certificates else None,
            uv=str(find_uv()),
            wheels=str(state / "wheels"),
            debs=str(state / "debs"),
            wheel=wheel,
        )
        _work(order, environment=sources.environment, narrate=narrate)
        check_unchanged(roll, Path(order.rolls_folder) / roll.name)
    narrate(f"{roll.name}: layer {layer.digest} baked in {time.monotonic() - start:.1f} s")


def _bake_disk(
    digest: str,
    layers: tuple[Layer, ...],
    trees: tuple[Path, ...],
    *,
    state: Path,
    narrate: Narrate,
) -> Image:
    names = tuple(layer.roll for layer in layers)
    with _half(images_folder(state) / digest) as folder:
        order = Order(
            kind="image",
            roll=names[-1],
            folder=str(folder),
            below=tuple(str(path) for path in trees),
            rolls_folder=str(resource_folder("rolls")),
            slack=SLACK,
        )
        _work(order, environment={}, narrate=narrate)
        about = run(
            ["qemu-img", "info", "--output=json", folder / "disk.qcow2"], deadline=60
        ).stdout
        write_image(
            folder,
            digest=digest,
            rolls=names,
            disk="disk.qcow2",
            format="qcow2",
            virtual_size=int(json.loads(about)["virtual-size"]),
        )
    found = find_image(state, digest)
    assert found is not None
    return found


def _work(order: Order, *, environment: Mapping[str, str], narrate: Narrate) -> None:
    """Have the worker carry out the order in namespaces of its own; raises what it says."""
    paper = Path(order.folder) / "order.json"
    paper.write_text(order.to_json())
    wrong: list[Failed] = []
    stray: list[str] = []

    def on_line(line: str) -> None:
        if line.startswith(SAY):
            narrate(line.removeprefix(SAY))
        elif line.startswith(WRONG):
            said = json.loads(line.removeprefix(WRONG))
            wrong.append(
                Failed(said["brief"], details=tuple(said["details"]), remedy=said["remedy"])
            )
        else:
            stray.append(line)
            del stray[:-12]

    # A PID and a mount namespace that die with this process: no daemon that a package
    # starts outlives the bake, and no mount is left, whatever ends it.
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
    words += ["--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    words += [sys.executable, "-m", "gpupt.edges.bakery", str(paper)]
    package = Path(__file__).resolve().parents[2]
    search = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    status = stream(
        words,
        deadline=_DEADLINE,
        on_line=on_line,
        environment={**environment, "PYTHONPATH": search},
    )
    paper.unlink(missing_ok=True)
    if wrong:
        raise wrong[0]
    if status != 0:
        raise Failed(f"the bake of {order.roll} ended with status {status}", details=tuple(stray))


@contextmanager
def _half(whole: Path) -> Iterator[Path]:
    """A folder under a temporary name beside ``whole``; renamed to it when all went well,
    else removed, but for its log, which is kept beside it."""
    whole.parent.mkdir(parents=True, exist_ok=True)
    half = whole.with_name(f".{whole.name}.half")
    _remove_tree(half)
    half.mkdir(mode=0o755)
    try:
        yield half
        _remove_tree(whole)
        half.rename(whole)
    except BaseException:
        log = half / "bake.log"
        if log.is_file():
            log.replace(whole.with_name(f"{whole.name}.failed.log"))
        _remove_tree(half)
        raise


def _remove_halves(state: Path) -> None:
    """Remove what a killed bake left; only ever called under the bake's lock."""
    for kind in ("layers", "images"):
        for half in (state / kind).glob(".*.half"):
            _remove_tree(half)


def _remove_tree(folder: Path) -> None:
    """Remove a tree; refuses one with a mount in it, which could be another's data."""
    if not folder.exists():
        return
    real = os.path.realpath(folder)
    with Path("/proc/self/mounts").open() as mounts:
        for line in mounts:
            at = line.split(" ")[1]
            if at.startswith(f"{real}/"):
                raise Failed(f"{folder} has a mount in it: {at}", remedy=f"umount {at}")
    run(["rm", "-rf", "--one-file-system", folder], deadline=600)
