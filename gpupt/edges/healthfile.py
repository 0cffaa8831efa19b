"""STATE/health.yaml: what the owner expects of the GPUs, and thresholds of their own."""

from __future__ import annotations

from pathlib import Path

from gpupt.edges.yamlfile import Value, read_yaml
from gpupt.errors import BadInput
from gpupt.model.healthrules import OVERRIDABLE, Expectations, Thresholds

MOST_GPUS = 1024
MOST_LINKS = 64


def health_file(state: Path) -> Path:
    """Where the rules of a state folder stand, if it has any."""
    return state / "health.yaml"


def read_rules(state: Path) -> tuple[Thresholds, Expectations]:
    """The rules of a state folder, the built-in ones where it has none; raises BadInput with
    file, line and column."""
    file = health_file(state)
    if not is_there(file):
        return Thresholds(), Expectations()
    top = read_yaml(file).fields("expect", "thresholds", "models")
    limits = numbers(top["thresholds"]) if "thresholds" in top else {}
    models = top["models"].entries() if "models" in top else {}
    return (
        Thresholds(
            **limits,  # type: ignore[arg-type]
            models={pattern: numbers(value) for pattern, value in models.items()},
        ),
        expected(top["expect"]) if "expect" in top else Expectations(),
    )


def is_there(file: Path) -> bool:
    """Whether there are rules; raises BadInput where that may not be known."""
    try:
        return file.exists()
    except OSError as error:
        raise BadInput(f"cannot read {file}", details=str(error), remedy="run as root") from None


def numbers(value: Value) -> dict[str, float]:
    """Thresholds by name."""
    return {name: number(each) for name, each in value.fields(*sorted(OVERRIDABLE)).items()}


def number(value: Value) -> float:
    """A number that is not negative."""
    try:
        found = float(value.text())
    except ValueError:
        value.wrong(f"{value.called} is no number", expected="a number, such as 10")
    if not 0 <= found < float("inf"):
        value.wrong(f"{value.called} is {value.text()}", expected="a number that is not negative")
    return found


def expected(value: Value) -> Expectations:
    """What there is to be."""
    found = value.fields("count", "mig", "confidential", "nvlinks")
    return Expectations(
        count=found["count"].whole(least=0, most=MOST_GPUS) if "count" in found else None,
        mig=yes_or_no(found["mig"]) if "mig" in found else None,
        confidential=yes_or_no(found["confidential"]) if "confidential" in found else None,
        nvlinks=found["nvlinks"].whole(least=0, most=MOST_LINKS) if "nvlinks" in found else None,
    )


def yes_or_no(value: Value) -> bool:
    """A mode that is on or off."""
    word = str(getattr(value.node, "value", "")).lower()
    if value.tag != "bool" or word not in {"true", "false", "yes", "no", "on", "off"}:
        value.wrong(f"{value.called} is no mode", expected="true or false")
    return word in {"true", "yes", "on"}
