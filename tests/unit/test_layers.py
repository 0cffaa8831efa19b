"""Which rolls a set needs, in what order, and what digests depend on."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from gpupt.decide.layers import closure, current_digests, plan_stack, short_digest
from gpupt.errors import BadInput
from gpupt.model.roll import Ground, Roll

GROUND = Ground("amd64", "trixie", "source")


def roll(name: str, *needs: str, digest: str = "") -> Roll:
    return Roll(name, "1", name, needs, (), None, (), (), digest or f"files of {name}")


def rolls(*given: Roll) -> dict[str, Roll]:
    return {one.name: one for one in given}


KNOWN = rolls(
    roll("base"),
    roll("host", "base"),
    roll("gpupt", "host"),
    roll("node", "base"),
    roll("spark", "node"),
    roll("tensorflow", "node"),
    roll("classifier", "spark", "tensorflow"),
)


def names(*wanted: str) -> list[str]:
    return [one.name for one in closure(wanted, KNOWN)]


def test_each_roll_comes_after_what_it_needs() -> None:
    assert names("classifier") == ["base", "node", "spark", "tensorflow", "classifier"]


def test_the_base_is_always_there() -> None:
    assert names() == ["base"]


def test_equal_sets_share_an_image_in_whatever_order_they_are_asked_for() -> None:
    wanted = ("spark", "tensorflow", "classifier")
    digests = {plan_stack(one, KNOWN, ground=GROUND).digest for one in permutations(wanted)}
    digests.add(plan_stack(["classifier"], KNOWN, ground=GROUND).digest)
    assert len(digests) == 1


def test_a_variant_stands_in_for_its_roll_wherever_that_is_needed() -> None:
    known = KNOWN | {"tensorflow=cuda": replace(KNOWN["tensorflow"], lock="cuda.lock")}
    stack = plan_stack(["classifier", "tensorflow=cuda"], known, ground=GROUND)
    assert stack.rolls == ("base", "node", "spark", "tensorflow=cuda", "classifier")
    plain = plan_stack(["classifier"], known, ground=GROUND)
    assert [a == b for a, b in zip(stack.layers, plain.layers, strict=True)] == [True] * 3 + [
        False
    ] * 2


def test_two_variants_of_one_roll_are_refused() -> None:
    known = KNOWN | {f"tensorflow={name}": KNOWN["tensorflow"] for name in ("cuda", "rocm")}
    with pytest.raises(BadInput, match="two variants of the roll tensorflow"):
        closure(["tensorflow=cuda", "tensorflow=rocm"], known)


def test_a_misspelt_roll_is_refused_with_a_near_match() -> None:
    with pytest.raises(BadInput) as caught:
        closure(["sprak"], KNOWN)
    assert caught.value.brief == "no roll is called 'sprak'"
    assert "did you mean spark" in caught.value.remedy


def test_a_need_that_is_not_there_names_who_needs_it() -> None:
    with pytest.raises(BadInput, match="'nodes', which mine needs"):
        closure(["mine"], KNOWN | rolls(roll("mine", "nodes")))


def test_a_circle_is_refused_and_shown() -> None:
    circle = KNOWN | rolls(roll("a", "b"), roll("b", "c"), roll("c", "a"))
    with pytest.raises(BadInput, match="a → b → c → a"):
        closure(["a"], circle)


def digests(known: dict[str, Roll], *wanted: str, ground: Ground = GROUND) -> dict[str, str]:
    return {one.roll: one.digest for one in plan_stack(wanted, known, ground=ground).layers}


def test_a_changed_roll_renames_itself_and_what_is_above_it_alone() -> None:
    before = digests(KNOWN, "classifier")
    changed = KNOWN | rolls(roll("spark", "node", digest="other files"))
    after = digests(changed, "classifier")
    assert {name for name in before if before[name] != after[name]} == {
        "spark",
        "tensorflow",
        "classifier",
    }


def test_gpupts_source_renames_the_layer_of_gpupt_alone() -> None:
    other = replace(GROUND, source_digest="other source")
    before, after = digests(KNOWN, "gpupt"), digests(KNOWN, "gpupt", ground=other)
    assert {name for name in before if before[name] != after[name]} == {"gpupt"}
    assert digests(KNOWN, "classifier") == digests(KNOWN, "classifier", ground=other)


@pytest.mark.parametrize(
    "other", [replace(GROUND, architecture="arm64"), replace(GROUND, suite="forky")]
)
def test_another_ground_renames_every_layer(other: Ground) -> None:
    before, after = digests(KNOWN, "spark"), digests(KNOWN, "spark", ground=other)
    assert all(before[name] != after[name] for name in before)


def test_each_layer_names_the_one_below() -> None:
    stack = plan_stack(["spark"], KNOWN, ground=GROUND)
    assert [one.below for one in stack.layers] == [
        None,
        *(one.digest for one in stack.layers[:-1]),
    ]


def test_parts_of_a_digest_cannot_run_into_each_other() -> None:
    assert short_digest("ab", "c") != short_digest("a", "bc")


def test_current_digests_hold_each_roll_alone_and_the_given_sets() -> None:
    found = current_digests([("spark", "tensorflow")], KNOWN, ground=GROUND)
    stack = plan_stack(("spark", "tensorflow"), KNOWN, ground=GROUND)
    assert stack.digest in found
    assert plan_stack(("gpupt",), KNOWN, ground=GROUND).digest in found
    alone = current_digests([], KNOWN, ground=GROUND)
    assert stack.digest not in alone


def test_a_set_with_a_roll_that_is_gone_leads_to_nothing() -> None:
    assert current_digests([("gone",)], KNOWN, ground=GROUND) == current_digests(
        [], KNOWN, ground=GROUND
    )
