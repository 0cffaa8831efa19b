"""Reads what the amdgpu driver tells of its cards in sysfs: heat, power, memory errors.

Documentation/gpu/amdgpu/thermal.rst (hwmon) and ras.rst.  The card's own controller answers
these questions, so a card that hangs may never do: they are asked in a child with a deadline.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

from gpupt.edges.apart import read_apart
from gpupt.edges.tree import Reader
from gpupt.model.health import GpuReading, RetiredPages, Silence
from gpupt.model.host import Gpu

DRIVER = "amdgpu"
# The worst of the sensors counts; edge, junction and memory are the first three.
SENSORS = range(1, 9)
# The list of bad pages has a line for each.
MOST = 1 << 20
MOST_CARDS = 16
PLAIN = {
    "uuid": "unique_id",
    "name": "product_name",
    "serial": "serial_number",
    "vbios": "vbios_version",
    "utilization": "gpu_busy_percent",
    "memory_total": "mem_info_vram_total",
    "memory_used": "mem_info_vram_used",
    "pcie_replays": "pcie_replay_count",
}
TEXTS = frozenset({"uuid", "name", "serial", "vbios"})
POWER = {
    "power": ("power1_average", "power1_input"),
    "power_limit": ("power1_cap",),
    "power_default": ("power1_cap_default",),
}
MICRO, MILLI = 1_000_000, 1000
# What the driver answers for a sensor or a block that this card does not have.
NOT_THERE = frozenset({errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP, errno.ENODATA, errno.ENODEV})
Told = Mapping[str, bytes | OSError]


def read_amdgpu(reader: Reader, gpus: Iterable[Gpu], *, deadline: float) -> list[GpuReading]:
    """What the driver tells of each of its cards that is awake; others are not among them.

    What a card did not tell within ``deadline`` seconds is TIMEOUT, however the others are, and
    what the driver does not have of it UNSUPPORTED.
    """
    ours = [
        (gpu, f"sys/bus/pci/devices/{gpu.address}")
        for gpu in gpus
        if gpu.device.binding.driver == DRIVER and not gpu.device.lost
    ]
    # A card that sleeps would be woken to answer.
    awake = [(gpu, folder) for gpu, folder in ours if not sleeps(reader, folder)]
    if not awake:
        return []
    paths = [list(files_of(reader, folder)) for _, folder in awake]
    # Each in a child of its own: one that hangs keeps no other from answering.
    with ThreadPoolExecutor(min(len(awake), MOST_CARDS)) as pool:
        told = list(pool.map(lambda each: told_of(reader, each, deadline=deadline), paths))
    return [
        reading_of(gpu, folder, files, answers)
        for (gpu, folder), files, answers in zip(awake, paths, told, strict=True)
        if not fell_asleep(answers)
    ]


def fell_asleep(told: Told) -> bool:
    """Whether the driver would not ask the card: it sleeps by now, or is being reset."""
    return any(
        isinstance(answer, OSError) and answer.errno == errno.EPERM for answer in told.values()
    )


def sleeps(reader: Reader, folder: str) -> bool:
    """Whether the kernel let the card sleep, however deep."""
    return reader.text(f"{folder}/power/runtime_status") == "suspended"


def files_of(reader: Reader, folder: str) -> Iterable[str]:
    """The files to read of a card, by what its folders list."""
    there = set(reader.names(folder))
    yield from (f"{folder}/{name}" for name in PLAIN.values() if name in there)
    if "hwmon" in there:
        for monitor in reader.names(f"{folder}/hwmon"):
            for name in reader.names(f"{folder}/hwmon/{monitor}"):
                if name.startswith(("temp", "power1_")) and name.endswith(
                    ("_input", "_crit", "_average", "_cap", "_default")
                ):
                    yield f"{folder}/hwmon/{monitor}/{name}"
    if "ras" in there:
        for name in reader.names(f"{folder}/ras"):
            if name.endswith("_err_count") or name == "gpu_vram_bad_pages":
                yield f"{folder}/ras/{name}"


def told_of(reader: Reader, paths: list[str], *, deadline: float) -> Told:
    """What each file holds, or why not; a file that did not answer in time is not in it."""
    if reader.top is None:
        at = {reader.root + path: path for path in paths}
        told = read_apart(list(at), deadline=deadline, read=much_of)
        return {at[path]: data for path, data in told.items()}
    absent = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    found = {path: reader.bytes(path, most=MOST) for path in paths}
    return {path: absent if data is None else data for path, data in found.items()}


def much_of(path: str) -> bytes:
    """Up to MOST bytes of a file, which sysfs gives page by page; raises OSError."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        whole = b""
        while len(whole) < MOST and (part := os.read(number, MOST)):
            whole += part
        return whole
    finally:
        os.close(number)


def reading_of(gpu: Gpu, folder: str, paths: list[str], told: Told) -> GpuReading:
    """The answers of one card, in the terms of all cards."""
    found: dict[str, object] = {}
    # What is not asked for here is not to be had.
    silent = {each.name: Silence.UNSUPPORTED for each in fields(GpuReading)}

    def number(path: str) -> int | None:
        data = told.get(path)
        try:
            return int(data) if isinstance(data, bytes) else None
        except ValueError:
            return None

    def take(field: str, value: object, *asked: str) -> None:
        """Keep a value, or why there is none: of the files that there are, what became of them."""
        if value is not None:
            found[field] = value
            del silent[field]
            return
        there = [path for path in asked if path in paths]
        silent[field] = why(there, told)

    for field, name in PLAIN.items():
        path = f"{folder}/{name}"
        data = told.get(path)
        text = data.decode(errors="replace").strip() if isinstance(data, bytes) else None
        if field in TEXTS:
            # Who it is bears on no check.
            if text:
                take(field, text)
            continue
        take(field, number(path), path)
    monitors = sorted({path.rpartition("/")[0] for path in paths if "/hwmon/" in path})
    for field, names in POWER.items():
        asked = [f"{monitor}/{name}" for monitor in monitors for name in names]
        micro = next((value for path in asked if (value := number(path)) is not None), None)
        take(field, None if micro is None else micro / MICRO, *asked)

    sensors = [f"{monitor}/temp{each}" for monitor in monitors for each in SENSORS]
    heats = [(number(f"{each}_input"), number(f"{each}_crit")) for each in sensors]
    margins = [
        (top // MILLI - now // MILLI, now // MILLI, top // MILLI)
        for now, top in heats
        if now is not None and top is not None and top > 0
    ]
    asked = [f"{each}_{kind}" for each in sensors for kind in ("input", "crit")]
    # A sensor that does not answer may be the one that is too hot.
    unheard = why([path for path in asked if path in paths], told) is not Silence.UNSUPPORTED
    worst = None if unheard or not margins else min(margins)
    for index, field in enumerate(("temperature_margin", "temperature", "temperature_slowdown")):
        take(field, None if worst is None else worst[index], *asked)

    counts = [path for path in paths if path.endswith("_err_count")]
    known = [count for path in counts if (count := uncorrected(told.get(path))) is not None]
    # An error of one block is one, whatever the others say.
    whole = len(known) == len(counts) or why(counts, told) is Silence.UNSUPPORTED
    take("ecc_uncorrected", sum(known) if known and (whole or sum(known)) else None, *counts)
    pages = f"{folder}/ras/gpu_vram_bad_pages"
    take("retired", bad_pages(told.get(pages)), pages)
    return GpuReading(gpu.address, silent=silent, **found)  # type: ignore[arg-type]


def why(paths: list[str], told: Told) -> Silence:
    """Why one of these files was of no use; UNSUPPORTED: the card has no such thing, or all
    that could be read is of use."""
    if any(path not in told for path in paths):
        return Silence.TIMEOUT
    answers = [told[path] for path in paths]
    errors = {answer.errno for answer in answers if isinstance(answer, OSError)} - NOT_THERE
    if errors:
        return Silence.DENIED if errors == {errno.EACCES} else Silence.ERROR
    garbled = any(isinstance(answer, bytes) and not is_sound(answer) for answer in answers)
    return Silence.ERROR if garbled else Silence.UNSUPPORTED


def is_sound(answer: bytes) -> bool:
    """Whether a file holds a number, counters, or a list; not so ``Query currently
    inaccessible``."""
    text = answer.strip()
    return not text or text.lstrip(b"-").isdigit() or b":" in text


def uncorrected(data: bytes | OSError | None) -> int | None:
    """The uncorrectable errors of a block: the line ``ue: N``; None: not told."""
    if isinstance(data, bytes):
        for line in data.splitlines():
            name, _, count = line.partition(b":")
            if name.strip() == b"ue" and count.strip().isdigit():
                return int(count)
    return None


def bad_pages(data: bytes | OSError | None) -> RetiredPages | None:
    """Pages out of use (R), and whether some wait to be (P), or could not be (F)."""
    if not isinstance(data, bytes) or not is_sound(data):
        return None
    flags = [line.rpartition(b":")[2].strip() for line in data.splitlines() if b":" in line]
    return RetiredPages(
        single_bit=len(flags), double_bit=0, pending=any(flag in {b"P", b"F"} for flag in flags)
    )
