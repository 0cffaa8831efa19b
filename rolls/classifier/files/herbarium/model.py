"""The network, the framework that runs it, and its files.

Keras is imported inside functions: which GPU it may see has to be settled first, and
whoever only draws sheets or reads results should not pay for it.  Nothing here is
TensorFlow's alone; KERAS_BACKEND=jax works as well.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

THRESHOLD = 0.5
BATCH = 64
"""Sheets that are predicted at once."""

WIDTHS = (8, 16, 24)
_WINDOW = 64 << 20
_PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class Held:
    """The GPUs that Spark gave a task: indices as its discovery printed them."""

    addresses: tuple[str, ...]


def load_framework(held: Held) -> ModuleType:
    """Keras, seeing the held GPUs and no others.  The first call in a process decides."""
    if "keras" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held.addresses) or "-1"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        # Keras imports pandas if it finds it, and would need it for data frames alone:
        # a fifth of the whole import.
        blocked = "pandas" not in sys.modules
        if blocked:
            sys.modules["pandas"] = None  # type: ignore[assignment]
        try:
            import keras
        finally:
            if blocked:
                del sys.modules["pandas"]
    import keras

    return keras


def sees_gpu(keras: ModuleType) -> bool:
    """Whether the framework has a GPU to compute on."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow

        return bool(tensorflow.config.list_physical_devices("GPU"))
    if keras.backend.backend() == "jax":
        import jax

        return bool(jax.default_backend() == "gpu")
    return False


def describe_device(keras: ModuleType, held: Held) -> str:
    """What computes here."""
    return f"gpu {','.join(held.addresses)}" if sees_gpu(keras) else describe_cpu(held)


def describe_cpu(held: Held, *, pci: Path = _PCI) -> str:
    """A processor, said plainly when a GPU is held that cannot be computed on."""
    if not held.addresses:
        return "cpu (no GPU held)"
    cards = read_gpus(pci)
    named = []
    for index in held.addresses:
        known = index.isdigit() and int(index) < len(cards)
        address, emulated = cards[int(index)] if known else (index, False)
        named.append(f"{'emulated GPU' if emulated else 'GPU'} {address}")
    why = "" if all(text.startswith("emulated") for text in named) else ", but no CUDA device"
    return f"cpu ({', '.join(named)} held{why})"


def read_gpus(pci: Path = _PCI) -> list[tuple[str, bool]]:
    """Addresses of NVIDIA's display controllers in order, each with whether it is emulated.

    A real card shows a window on its memory, 64 MiB at the very least (sysfs: resource, a
    line of start, end and flags for each BAR); what stands in for one shows none.
    """
    found = []
    for device in sorted(pci.iterdir()) if pci.is_dir() else ():
        vendor = int((device / "vendor").read_text(), 16)
        kind = int((device / "class").read_text(), 16) >> 16
        if vendor == 0x10DE and kind == 0x03:
            bars = (device / "resource").read_text().splitlines()[:6]
            sizes = [_size(*bar.split()[:2]) for bar in bars]
            found.append((device.name, max(sizes, default=0) < _WINDOW))
    return found


def _size(start: str, end: str) -> int:
    return int(end, 16) - int(start, 16) + 1 if int(end, 16) else 0


def build(keras: ModuleType, *, height: int, width: int, widths: Sequence[int] = WIDTHS) -> Any:
    """Pixels 0…255, (sheets, height, width, 3), to the probability of a stain, (sheets, 1).

    Each sheet is first brought to mean 0 and deviation 1 in each colour, so that neither
    exposure nor the paper's tone counts; every convolution halves the sides.
    """
    layers = keras.layers
    stack = [
        keras.Input((height, width, 3)),
        layers.Rescaling(1 / 127.5, offset=-1),
        layers.GroupNormalization(groups=-1, center=False, scale=False),
    ]
    for filters in widths:
        stack += [
            layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9, scale=False),
            layers.Activation("relu"),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(1, activation="sigmoid")]
    return keras.Sequential(stack)


def widths_for(height: int) -> tuple[int, ...]:
    """Filters of each convolution: one more for each doubling over 32 pixels."""
    widths = list(WIDTHS)
    while height >> len(widths) > 4:
        widths.append(min(128, widths[-1] * 2))
    return tuple(widths)


def predict(model: Any, pixels: np.ndarray) -> np.ndarray:
    """The probability of a stain for each sheet, float32 (sheets,).

    Batches are of one size, the last filled up: a new size would be compiled anew.
    """
    scores = np.empty(len(pixels), np.float32)
    for start in range(0, len(pixels), BATCH):
        part = pixels[start : start + BATCH]
        full = np.zeros((BATCH, *part.shape[1:]), np.float32)
        full[: len(part)] = part
        scores[start : start + BATCH] = np.asarray(model.predict_on_batch(full))[: len(part), 0]
    return scores


def may_compile(keras: ModuleType) -> bool:
    """Whether compiling for the device pays: on a CPU, XLA takes longer than it saves here."""
    return keras.backend.backend() == "jax" or sees_gpu(keras)


def save(model: Any, record: Mapping[str, Any], folder: Path) -> None:
    """model.keras and model.json in a new folder, which appears whole or not at all.

    Raises FileExistsError when the folder exists: no model is overwritten.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: a model is never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    partial.chmod(0o755)
    model.save(partial / "model.keras")
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    (partial / "model.json").write_text(text, encoding="utf-8")
    for name in ("model.keras", "model.json"):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder)


def load(keras: ModuleType, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A saved model, ready to predict, and its record."""
    record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model = keras.saving.load_model(folder / "model.keras", compile=False)
    model.jit_compile = may_compile(keras)
    return model, record


def versions(keras: ModuleType) -> dict[str, str]:
    """Versions of what decides the numbers."""
    import PIL

    backend = keras.backend.backend()
    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "keras": keras.__version__,
        "backend": backend,
    }
    found[backend] = sys.modules[backend].__version__ if backend in sys.modules else "?"
    return found
