"""The fake kernel answers every write as a real one did (Linux 6.12, on emulated cards)."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from machines import emulated_host

from gpupt.errors import Failed

TRANSCRIPT = Path(__file__).parents[1] / "hosts/binding-answers.jsonl"
CARD = "0000:02:00.0"


def test_the_fake_answers_as_the_kernel_did(tmp_path: Path) -> None:
    kernel = emulated_host(tmp_path)
    lines = [json.loads(line) for line in TRANSCRIPT.read_text().splitlines()]
    assert len(lines) > 20
    for number, (path, text, answer, driver, override) in enumerate(lines):
        try:
            kernel.write(PurePosixPath("sys/bus/pci") / path, f"{text}\n", deadline=1)
            said = None
        except Failed as error:
            said = error.brief.rpartition("(")[2].rstrip(")")
        folder = kernel.root / "sys/bus/pci/devices" / CARD
        stands = (folder / "driver_override").read_text().strip()
        assert (said, kernel.driver_of(CARD), stands) == (answer, driver, override), (
            f"line {number + 1}: {path} ← {text}"
        )
