"""Packs this very installation of gpupt as a wheel: a checkout, an editable install and an
installed wheel alike, with no build backend and no network."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from gpupt import __version__
from gpupt.edges.resources import resource_folder
from gpupt.edges.rolls import files_of
from gpupt.errors import Failed

_EPOCH = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = {".pyc", ".so"}


def source_files() -> dict[str, Path]:
    """Every file a wheel of gpupt holds, by its path in the wheel, sorted."""
    package = Path(__file__).resolve().parent.parent
    folders = {
        "gpupt": package,
        "gpupt/rolls": resource_folder("rolls"),
        "gpupt/playbooks": resource_folder("playbooks"),
        "gpupt/templates": resource_folder("templates"),
        "gpupt/examples": resource_folder("examples"),
    }
    found: dict[str, Path] = {}
    for inside, folder in folders.items():
        for path in files_of(folder):
            if path.suffix not in _LEFT_OUT:
                found[f"{inside}/{path.relative_to(folder).as_posix()}"] = path
    return dict(sorted(found.items()))


def source_digest() -> str:
    """SHA-256 over gpupt's own source: what the layer of the roll ``gpupt`` depends on."""
    total = hashlib.sha256()
    for name, path in source_files().items():
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def pack_wheel(folder: Path) -> Path:
    """Write gpupt's wheel into ``folder`` and return it; the same source gives the same bytes.

    Raises Failed when gpupt is not installed, even as a checkout's editable install.
    """
    try:
        installed = distribution("gpupt")
    except PackageNotFoundError:
        raise Failed(
            "gpupt cannot find its own metadata, which its wheel needs",
            remedy="install it first: pip install -e . in the checkout",
        ) from None
    info = f"gpupt-{__version__}.dist-info"
    contents = {name: path.read_bytes() for name, path in source_files().items()}
    contents[f"{info}/METADATA"] = _metadata(installed)
    contents[f"{info}/entry_points.txt"] = b"[console_scripts]\ngpupt = gpupt.cli.main:main\n"
    contents[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: gpupt\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = [f"{name},sha256={_record_hash(raw)},{len(raw)}" for name, raw in contents.items()]
    record.append(f"{info}/RECORD,,")
    contents[f"{info}/RECORD"] = ("\n".join(record) + "\n").encode()
    wheel = folder / f"gpupt-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in contents.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, raw)
    return wheel


def _metadata(installed: Distribution) -> bytes:
    text = installed.read_text("METADATA") or installed.read_text("PKG-INFO")
    if not text:
        raise Failed("gpupt's own metadata is empty", remedy="reinstall gpupt")
    return text.encode()


def _record_hash(raw: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
