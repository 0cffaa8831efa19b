"""What each Xid of NVIDIA's catalogue asks for, and what the driver's own advice makes of it."""

from __future__ import annotations

import pytest

from gpupt.decide.xid import (
    ADVICE_CHANGED,
    CATALOGUE,
    VERDICTS,
    Action,
    Recovery,
    Weighed,
    advised,
    remedy_of,
    verdict_of,
    way_of,
    weigh,
)
from gpupt.model.health import Verdict
from gpupt.model.kernellog import XidEvent
from gpupt.model.pci import PciAddress

CARD = PciAddress.parse("0000:41:00.0")
# As NVIDIA's catalogue has them (docs.nvidia.com/deploy/xid-errors), written down apart from
# the code, with its own ranges.
RESTART_APP = (
    "8 11 13 25 31 32 39-41 60 68-72 75-77 80 82-86 88 89 94 96-105 126-135 139"
)  # fmt: skip
LOG = "37 38 43 44 63 66 67 92 93 106 107 121 137 141 152 153 157 160 161"
RESET = "46 62 64 95 109 110 119 120 136 140 143 155 156 158"
WORKFLOW = "45 48 74 144-150"


def numbers(words: str) -> set[int]:
    """The numbers of a text such as ``8 39-41``."""
    found: set[int] = set()
    for word in words.split():
        first, _, last = word.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def event(xid: int, message: str = "") -> XidEvent:
    return XidEvent(CARD, xid, message)


def one(xid: int, message: str = "", *, advice: int | None = None) -> Weighed:
    (weighed,) = weigh([event(xid, message)], advice=advice)
    return weighed


def change(old: int, new: int, words: str = "GPU Reset Required") -> XidEvent:
    text = f"GPU recovery action changed from 0x{old:x} (None) to 0x{new:x} ({words})"
    return event(ADVICE_CHANGED, text)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Action.RESTART_APP, RESTART_APP),
        (Action.LOG, LOG),
        (Action.RESET_GPU, RESET),
        (Action.WORKFLOW, WORKFLOW),
        (Action.RESTART_HOST, "79"),
        (Action.RESTART_VM, "151"),
        (Action.POWER_CABLE, "54"),
        (Action.UPDATE_SOFTWARE, "78"),
        (Action.CONTACT_SUPPORT, "142"),
        (Action.DRIVER_ADVICE, "154"),
    ],
)
def test_the_catalogue_number_by_number(action: Action, words: str) -> None:
    assert {number for number, each in CATALOGUE.items() if each is action} == numbers(words)


@pytest.mark.parametrize("number", [0, 1, 73, 81, 87, 90, 91, 108, 138, 159, 162, 999])
def test_what_is_not_in_the_catalogue_is_to_be_looked_up(number: int) -> None:
    weighed = one(number)
    assert (weighed.action, weighed.verdict) == (Action.UNKNOWN, Verdict.WARN)
    assert "look it up" in weighed.remedy


@pytest.mark.parametrize(
    ("xid", "verdict"),
    [
        (31, Verdict.WARN),
        (63, Verdict.OK),
        (95, Verdict.FAIL),
        (48, Verdict.FAIL),
        (79, Verdict.FAIL),
        (151, Verdict.FAIL),
        (54, Verdict.FAIL),
        (78, Verdict.WARN),
        (142, Verdict.FAIL),
    ],
)
def test_a_verdict_for_each_action(xid: int, verdict: Verdict) -> None:
    weighed = one(xid)
    assert weighed.verdict is verdict
    assert bool(weighed.remedy) is (verdict is not Verdict.OK)


def test_every_action_has_a_verdict_and_all_but_the_record_a_remedy() -> None:
    assert set(VERDICTS) == set(Action)
    silent = {action for action in Action if not remedy_of(action, CARD)}
    assert silent == {Action.LOG}


def test_an_application_never_fails_a_card() -> None:
    verdicts = {one(number).verdict for number in numbers(RESTART_APP)}
    assert verdicts == {Verdict.WARN}


def test_remedies_name_the_card() -> None:
    assert "nvidia-smi --gpu-reset -i 0000:41:00.0" in one(95).remedy
    assert "0000:41:00.0" not in one(31).remedy


def test_a_cleanup_is_of_another_error() -> None:
    assert one(45, "Ch 00000001 caused by previous Xid 48").verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        ("RLW_RXPIPE Nonfatal XC0 i0 Link 13 (0x0409a0c2)", Verdict.WARN),
        ("SAW_MVB Non-fatal XC0 i0 Link 0 (0x00000001)", Verdict.WARN),
        ("NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x026001c6)", Verdict.FAIL),
        ("", Verdict.FAIL),
    ],
)
def test_an_nvlink_error_says_whether_it_is_fatal(message: str, verdict: Verdict) -> None:
    assert one(149, message).verdict is verdict


def test_only_nvlink_says_so() -> None:
    assert one(95, "Nonfatal").verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("number", "words", "verdict", "remedy"),
    [
        (0, "None", Verdict.OK, ""),
        (1, "GPU Reset Required", Verdict.FAIL, "--gpu-reset"),
        (1, "PF FLR", Verdict.FAIL, "--gpu-reset"),
        (2, "Node Reboot Required", Verdict.FAIL, "systemctl reboot"),
        (2, "OS Reboot", Verdict.FAIL, "systemctl reboot"),
        (3, "Drain P2P", Verdict.WARN, "between GPUs"),
        (4, "Drain and Reset", Verdict.FAIL, "let the work on it end"),
        (9, "Something New", Verdict.FAIL, "newer than this gpupt"),
    ],
)
def test_154_names_what_is_to_be_done(
    number: int, words: str, verdict: Verdict, remedy: str
) -> None:
    (weighed,) = weigh([change(0 if number else 1, number, words)])
    assert (weighed.action, weighed.verdict) == (Action.DRIVER_ADVICE, verdict)
    assert remedy in weighed.remedy
    assert bool(weighed.remedy) is bool(remedy)


def test_154_in_other_words_fails_and_says_where_to_look() -> None:
    weighed = one(ADVICE_CHANGED, "of a driver to come")
    assert weighed.verdict is Verdict.FAIL
    assert "recovery action" in weighed.remedy


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)", 1),
        ("GPU recovery action changed from 0x2 (Node Reboot Required) to 0x0 (None)", 0),
        ("GPU recovery action changed from 0x1 (None) to 0xa (A)", 10),
        ("GPU recovery action changed", None),
        ("", None),
    ],
)
def test_the_advice_in_a_message(message: str, number: int | None) -> None:
    assert advised(message) == number


def test_the_last_advice_counts() -> None:
    weighed = weigh([event(95), change(0, 1), change(1, 0, "None")])
    assert [each.verdict for each in weighed] == [Verdict.WARN, Verdict.OK, Verdict.OK]
    weighed = weigh([event(95), change(1, 0, "None"), change(0, 2, "Node Reboot Required")])
    assert [each.verdict for each in weighed] == [Verdict.FAIL, Verdict.OK, Verdict.FAIL]


def test_what_comes_after_the_advice_is_judged_by_the_catalogue() -> None:
    weighed = weigh([change(1, 0, "None"), event(95)])
    assert [each.verdict for each in weighed] == [Verdict.OK, Verdict.FAIL]


def test_the_drivers_advice_of_now_comes_first() -> None:
    stale = [event(95), change(0, 1)]
    assert [each.verdict for each in weigh(stale, advice=0)] == [Verdict.WARN, Verdict.OK]
    assert [each.verdict for each in weigh(stale, advice=1)] == [Verdict.FAIL, Verdict.OK]
    assert one(31, advice=0).verdict is Verdict.OK


@pytest.mark.parametrize("xid", [54, 79, 142, 151])
def test_what_no_reset_mends_stays(xid: int) -> None:
    assert one(xid, advice=0).verdict is Verdict.FAIL


def test_every_advice_has_a_way_but_none() -> None:
    ways = {each: way_of(each, CARD) for each in Recovery}
    assert [each for each, way in ways.items() if not way] == [Recovery.NONE]
    assert verdict_of(Recovery.NONE) is Verdict.OK
    assert verdict_of(99) is Verdict.FAIL


def test_no_events_weigh_nothing() -> None:
    assert weigh([]) == ()
    assert weigh([], advice=1) == ()
