"""Rolls as they are read: this repository's own, and every mistake with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpupt.decide.layers import closure
from gpupt.edges.resources import resource_folder
from gpupt.edges.rolls import check_lock, folder_digest, read_roll, read_rolls, verify_roll
from gpupt.errors import BadInput

GOOD = "version: '1'\nsummary: It is a roll\n"
OWN = read_rolls()


def write(folder: Path, text: str, *, name: str = "mine") -> Path:
    home = folder / name
    home.mkdir()
    (home / "roll.yaml").write_text(text)
    return home


@pytest.mark.parametrize("name", OWN)
def test_every_roll_of_ours_is_whole(name: str) -> None:
    assert closure([name], OWN)[-1] == OWN[name]
    assert verify_roll(OWN[name])


def test_a_whole_roll_is_read(tmp_path: Path) -> None:
    home = write(
        tmp_path,
        GOOD
        + "needs: [base]\npackages: [a, b]\nsources: [c]\nlock: files/r.lock\n"
        + "checks:\n- {name: up, command: [a, b], roles: [compute], deadline: 5}\n"
        + "jobs:\n- {name: go, summary: Goes, command: [c], deadline: 6}\n",
    )
    (home / "files").mkdir()
    (home / "files/r.lock").write_text("a==1 --hash=sha256:00\n")
    roll, _ = read_roll(home)
    assert (roll.name, roll.version, roll.needs, roll.packages) == (
        "mine",
        "1",
        ("base",),
        ("a", "b"),
    )
    assert (roll.sources, roll.lock) == (("c",), "files/r.lock")
    assert (roll.checks[0].command, roll.checks[0].roles) == (("a", "b"), ("compute",))
    assert (roll.jobs[0].name, roll.jobs[0].deadline) == ("go", 6)


@pytest.mark.parametrize(
    ("text", "brief", "place"),
    [
        ("version: 1\nsummary: x\npakages: []\n", "unknown key 'pakages'", "3:1"),
        ("summary: x\n", "key 'version' is missing", "1:1"),
        ("version: 1\nsummary: ''\n", "summary is empty", "2:10"),
        (GOOD + "needs: base\n", "needs is 'base'", "3:8"),
        (GOOD + "lock: files/gone.lock\n", "the lock 'files/gone.lock' is not there", "3:7"),
        (
            GOOD + "checks:\n- {name: a, command: [a], roles: [worker], deadline: 5}\n",
            "no node has the role 'worker'",
            "4:35",
        ),
        (
            GOOD + "checks:\n- {name: a, command: [], roles: [host], deadline: 5}\n",
            "the command is empty",
            "4:22",
        ),
        (
            GOOD + "jobs:\n- {name: a, summary: b, command: [a], deadline: soon}\n",
            "deadline of job a is 'soon'",
            "4:49",
        ),
        (
            GOOD + "jobs:\n- {name: a, command: [a], deadline: 5}\n",
            "key 'summary' is missing",
            "4:3",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_place(
    tmp_path: Path, text: str, brief: str, place: str
) -> None:
    home = write(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        read_roll(home)
    assert caught.value.brief == brief
    assert caught.value.details[0] == f"at {home}/roll.yaml:{place}"


def test_a_variant_is_its_roll_with_another_lock(tmp_path: Path) -> None:
    home = write(tmp_path, GOOD + "lock: a.lock\nvariants: [{name: cuda, lock: b.lock}]\n")
    for name in ("a.lock", "b.lock"):
        (home / name).write_text("a==1 --hash=sha256:00\n")
    found = read_rolls(tmp_path)
    assert {key: (one.name, one.lock) for key, one in found.items()} == {
        "mine": ("mine", "a.lock"),
        "mine=cuda": ("mine", "b.lock"),
    }
    assert found["mine=cuda"].summary == f"{found['mine'].summary} (variant cuda)"


def test_a_variant_whose_lock_is_not_there_is_refused(tmp_path: Path) -> None:
    home = write(tmp_path, GOOD + "variants: [{name: cuda, lock: b.lock}]\n")
    with pytest.raises(BadInput, match=r"the lock 'b\.lock' is not there"):
        read_roll(home)


def test_a_folder_that_cannot_be_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be a roll's name"):
        read_roll(write(tmp_path, GOOD, name="My_Roll"))


def test_a_folder_without_roll_yaml_is_no_roll(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    write(tmp_path, GOOD)
    assert list(read_rolls(tmp_path)) == ["mine"]


def test_the_digest_covers_paths_and_content_but_no_cache_and_no_mode(tmp_path: Path) -> None:
    home = write(tmp_path, GOOD)
    first = folder_digest(home)
    (home / "__pycache__").mkdir()
    (home / "__pycache__/x.pyc").write_text("x")
    (home / "roll.yaml").chmod(0o755)
    assert folder_digest(home) == first
    (home / "a").write_text("x")
    second = folder_digest(home)
    (home / "a").rename(home / "b")
    assert len({first, second, folder_digest(home)}) == 3


@pytest.mark.parametrize(
    ("line", "brief"),
    [
        ("--index-url https://example.org/simple", "holds an option: --index-url"),
        ("a>=1 --hash=sha256:00", "does not pin a>=1"),
        ("a==1", "does not pin a==1"),
    ],
)
def test_a_lock_that_does_not_pin_is_refused(tmp_path: Path, line: str, brief: str) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# made by uv\nb==2 \\\n    --hash=sha256:00\n{line}\n")
    with pytest.raises(BadInput, match=re.escape(brief)):
        check_lock(lock)


def pins(path: Path) -> dict[str, str]:
    """Version by name of what a lock pins."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", path.read_text(), re.M)
    return dict(found)


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-cuda.lock"])
def test_locks_of_rolls_that_meet_in_one_environment_agree(name: str) -> None:
    rolls = resource_folder("rolls")
    spark = pins(rolls / "spark/files/requirements.lock")
    tensorflow = pins(rolls / "tensorflow/files" / name)
    shared = spark.keys() & tensorflow.keys()
    assert "numpy" in shared
    assert {name for name in shared if spark[name] != tensorflow[name]} == set()


def test_no_file_of_a_roll_names_a_package_source() -> None:
    forbidden = re.compile(rb"https?://(?!www\.w3\.org)[a-z0-9.-]*(?:debian|pypi|pythonhosted)")
    folder = resource_folder("rolls")
    guilty = [p for p in folder.rglob("*") if p.is_file() and forbidden.search(p.read_bytes())]
    assert guilty == []
