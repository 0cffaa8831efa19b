"""The documentation names what there is: verbs, checks, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpupt.cli.main import VERBS
from gpupt.decide.doctor import CHECKS, ELSEWHERE
from gpupt.edges.specfile import parse_specfile

HERE = Path(__file__).resolve().parents[2]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").rglob("*.md")), *(HERE / "bench").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_verb_in_the_readme_exists_and_none_is_left_out() -> None:
    text = (HERE / "README.md").read_text()
    table = text[text.index("## Verbs") : text.index("| exit")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {word.split()[0] for row in rows for word in re.findall(r"`([^`]+)`", row)}
    lab = {"run", "shell", "down", "demo"}  # `lab up`, `run`, … of the last row
    assert set(VERBS) - named == set()
    assert named - set(VERBS) - lab == set()


def test_every_check_of_doctor_is_described() -> None:
    described = re.findall(r"^\| `([a-z0-9-]+)` \|", (HERE / "docs/doctor.md").read_text(), re.M)
    assert sorted(described) == sorted({*CHECKS, *ELSEWHERE})


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_the_cluster_file_shown_is_one(page: str) -> None:
    blocks = re.findall(r"```yaml\n(cluster:.*?)```", (HERE / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        found = parse_specfile(block, file=page, known_rolls=("spark", "tensorflow", "classifier"))
        assert found.spec.name == "herbarium"
