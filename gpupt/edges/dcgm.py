"""The gate to DCGM: ``dcgmi diag`` of one card, where it is installed.

Written after NVIDIA's documentation and after answers of DCGM 3 and 4 that others published; it
was never run against a real DCGM.  So it believes little: what it does not know is no pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gpupt.edges.process import run
from gpupt.errors import DeadlineExceeded, Failed
from gpupt.model.burnin import DcgmReading, DcgmTest
from gpupt.model.health import Silence
from gpupt.model.pci import PciAddress

PROGRAM = "dcgmi"
# Seconds; level 2 takes about two minutes, more where there are many cards.
DEADLINE = 600.0
_ROW = re.compile(r"^\|\s*(?P<number>\d*)\s*\|(?P<said>.*)\|\s*$")
_BUS = re.compile(r"PCI Bus ID:\s*(?P<address>[0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f]+\.\d)")


def read_dcgm(
    address: PciAddress, *, level: int = 2, deadline: float = DEADLINE, program: str = PROGRAM
) -> DcgmReading:
    """What DCGM's diagnostic of that level says of a card; ``silent`` when it says nothing."""
    try:
        listed = run([program, "discovery", "-l"], deadline=deadline)
    except DeadlineExceeded as error:
        return DcgmReading(address, silent=Silence.TIMEOUT, details=error.brief)
    except Failed as error:
        # Not installed, or its host engine does not run.
        return DcgmReading(address, silent=Silence.UNSUPPORTED, details=error.brief)
    number = parse_numbers(listed.stdout).get(address)
    if number is None:
        return DcgmReading(
            address, silent=Silence.UNSUPPORTED, details=f"DCGM does not list {address}"
        )
    words = [program, "diag", "-r", str(level), "-j", "-i", str(number)]
    try:
        # A test that fails is a status of its own, with all answers.
        done = run(words, deadline=deadline, check=False)
    except Failed as error:
        late = isinstance(error, DeadlineExceeded)
        silence = Silence.TIMEOUT if late else Silence.ERROR
        return DcgmReading(address, silent=silence, details=error.brief)
    tests = parse_tests(done.stdout, number)
    if tests:
        return DcgmReading(address, tests)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[:1]
    return DcgmReading(
        address,
        silent=Silence.CRASHED if done.status < 0 else Silence.ERROR,
        details=f"no test in its answer (status {done.status}): {' '.join(said)}",
    )


def parse_numbers(text: str) -> dict[PciAddress, int]:
    """DCGM's numbers of the cards, from the table of ``dcgmi discovery -l``."""
    numbers: dict[PciAddress, int] = {}
    current: int | None = None
    for line in text.splitlines():
        row = _ROW.match(line)
        if row is None:
            # A rule between two cards: the next has a number of its own.
            current = None
            continue
        if row["number"]:
            current = int(row["number"])
        bus = _BUS.search(row["said"])
        if bus is not None and current is not None:
            numbers[PciAddress.parse(bus["address"])] = current
    return numbers


def parse_tests(text: str, number: int) -> tuple[DcgmTest, ...]:
    """The tests of the card with that number in the JSON of ``dcgmi diag -j``.

    DCGM 3 names the cards of a result ``gpu_id`` or ``gpu_ids``; DCGM 4 names an entity.  A
    result that names none is of the machine, and counts for each card.
    """
    try:
        # Words may come before it.
        said = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return ()
    return tuple(
        DcgmTest(
            str(test.get("name", "unnamed")),
            str(result.get("status", "")),
            tuple(messages(result)),
            tuple(severities(result)),
        )
        for test in tests_in(said)
        for result in dicts(test.get("results"))
        if is_of(result, number)
    )


def tests_in(said: Any) -> Iterator[dict[str, Any]]:
    """Every test in an answer, in whatever category and under whatever heading."""
    for value in said.values() if isinstance(said, dict) else ():
        if isinstance(value, dict):
            yield from tests_in(value)
    if isinstance(said, dict):
        for category in dicts(said.get("test_categories")):
            yield from dicts(category.get("tests"))


def dicts(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none where there is no list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def is_of(result: dict[str, Any], number: int) -> bool:
    """Is a result of the card with that number, or of no card?"""
    if "entity_id" in result:
        group = str(result.get("entity_group", "GPU")).upper()
        return group == "GPU" and str(result["entity_id"]) == str(number)
    named = result.get("gpu_ids", result.get("gpu_id"))
    return named is None or str(number) in re.findall(r"\d+", str(named))


def warnings_of(result: dict[str, Any]) -> list[Any]:
    """The warnings of a result: one text, or a list of texts or of objects."""
    said = result.get("warnings")
    return said if isinstance(said, list) else [] if said is None else [said]


def messages(result: dict[str, Any]) -> Iterator[str]:
    """What the warnings of a result say."""
    for each in warnings_of(result):
        yield str(each.get("warning", each) if isinstance(each, dict) else each).strip()


def severities(result: dict[str, Any]) -> Iterator[int]:
    """How severe DCGM finds them, in the numbers of dcgmErrorSeverity_t."""
    for each in warnings_of(result):
        if isinstance(each, dict) and isinstance(each.get("error_severity"), int):
            yield each["error_severity"]
