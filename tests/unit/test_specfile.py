"""cluster.yaml becomes a ClusterSpec, or an error that names file, line and column."""

from __future__ import annotations

import json
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpupt.edges.specfile import parse_size, parse_specfile, read_specfile
from gpupt.errors import BadInput
from gpupt.model.cluster import GpuRequest, Role

ROLLS = ["spark", "tensorflow", "classifier"]
GOOD = """\
cluster: herbarium
rolls: [spark, classifier]
network: {subnet: 10.71.5.0/24}
nodes:
  - {name: frontend, role: frontend, cpus: 2, memory: 2560 MiB}
  - name: compute-0
    role: compute
    cpus: 2
    memory: 1.5 GiB
    disk: 20 GiB
    gpus: ["01:00.0", big]
  - {name: compute-1, role: compute, cpus: 2, memory: 3 GiB, gpus: 1}
"""


def test_good_file_is_read_whole() -> None:
    read = parse_specfile(GOOD, file="c.yaml", known_rolls=ROLLS)
    spec = read.spec
    assert (spec.name, spec.rolls, spec.subnet) == (
        "herbarium",
        ("spark", "classifier"),
        IPv4Network("10.71.5.0/24"),
    )
    frontend, first, second = spec.nodes
    assert spec.frontend is frontend
    assert (frontend.role, frontend.memory, frontend.disk) == (Role.FRONTEND, 2560 << 20, 0)
    assert (first.memory, first.disk) == (1536 << 20, 20 << 30)
    # Addresses take their full form; aliases are kept for whoever knows them.
    assert first.gpus == GpuRequest(named=("0000:01:00.0", "big"))
    assert second.gpus == GpuRequest(count=1)
    assert read.places["nodes[1].gpus[0]"] == "c.yaml:11:12"
    assert read.places["network.subnet"] == "c.yaml:3:19"


def test_example_is_good() -> None:
    for file in (Path(__file__).parents[2] / "examples").glob("*.yaml"):
        assert read_specfile(file, known_rolls=ROLLS).spec.name


def test_network_may_be_left_out() -> None:
    text = GOOD.replace("network: {subnet: 10.71.5.0/24}\n", "")
    spec = parse_specfile(text, file="c.yaml", known_rolls=ROLLS).spec
    assert spec.subnet == IPv4Network("10.71.0.0/24")


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("cpus: 2, memory: 2560", "cpu: 2, memory: 2560", "5:38", "did you mean 'cpus'"),
        ("cluster: herbarium", "clutser: herbarium", "1:1", "did you mean 'cluster'"),
        ("subnet: 10.71.5.0/24", "subnets: 10.71.5.0/24", "3:11", "did you mean 'subnet'"),
        ("spark, classifier", "sprak, classifier", "2:9", "did you mean 'spark'"),
        ("spark, classifier", "spark, spark", "2:16", "a second time"),
        ("spark, classifier", "slurm, spark", "2:9", "unknown roll 'slurm'"),
        ("cpus: 2, memory: 2560 MiB", "cpus: two, memory: 2560 MiB", "5:44", "a whole number"),
        (
            "cpus: 2, memory: 2560 MiB",
            "cpus: 0, memory: 2560 MiB",
            "5:44",
            "cpus of node frontend is 0",
        ),
        ("2560 MiB", "2560 MB", "5:55", "did you mean 2560 MiB"),
        ("2560 MiB", "2560", "5:55", "write 2560 MiB"),
        ("2560 MiB", "lots", "5:55", "'lots' is not a size"),
        ("2560 MiB", "1 MiB", "5:55", "64 MiB to"),
        ("2560 MiB", "999999.5 KiB", "5:55", "whole MiB"),
        ("2560 MiB", "[1]", "5:55", "a list"),
        ("10.71.5.0/24", "10.71.5.1/24", "3:19", "did you mean 10.71.5.0/24"),
        ("10.71.5.0/24", "10.71.5/24", "3:19", "not an IPv4 subnet"),
        ("10.71.5.0/24", "8.8.8.0/24", "3:19", "not a private subnet"),
        ("10.71.5.0/24", "10.71.5.0/30", "3:19", "too wide or too narrow"),
        ("10.71.5.0/24", "10.0.0.0/8", "3:19", "too wide or too narrow"),
        ("10.71.5.0/24", "fd00::/64", "3:19", "not an IPv4 subnet"),
        ("name: compute-1", "name: compute-0", "12:12", "two nodes are named 'compute-0'"),
        ("name: compute-1", "name: Compute_1", "12:12", "did you mean 'compute-1'"),
        ("name: compute-1", "name: -x", "12:12", "did you mean 'x'"),
        ("name: compute-1", "name: localhost", "12:12", "not localhost"),
        ("name: compute-1", "name: 7", "12:12", "not only digits"),
        ("name: compute-1", f"name: {'a' * 64}", "12:12", "at most 63"),
        ("name: compute-1", 'name: "compute-1\\n"', "12:12", "RFC 1123"),
        ("name: compute-1", "name: ../../etc", "12:12", "RFC 1123"),
        ("cluster: herbarium", "cluster: a/b", "1:10", "did you mean 'a-b'"),
        ("compute, cpus: 2, memory: 3", "frontend, cpus: 2, memory: 3", "12:5", "second frontend"),
        ("role: frontend", "role: compute", "5:3", "no node is the frontend"),
        ("role: frontend", "role: frontent", "5:28", "did you mean 'frontend'"),
        ("role: frontend, ", "", "5:5", "key 'role' is missing"),
        ("gpus: 1", "gpus: -1", "12:68", "is -1"),
        ("gpus: 1", "gpus: all", "12:68", "not a list and not a count"),
        ("gpus: 1", "gpus: true", "12:68", "not a list and not a count"),
        ("gpus: 1", 'gpus: ["0000:01:00.0"]', "12:69", "named twice"),
        ("gpus: 1", "gpus: [big]", "12:69", "named twice"),
        ("gpus: 1", 'gpus: ["01:99.0"]', "12:69", "not a PCI address"),
        ("gpus: 1", 'gpus: ["a b"]', "12:69", "names no GPU"),
        ("nodes:\n", "nodes: 3\nx:\n", "5:1", "unknown key 'x'"),
        ("rolls: [spark, classifier]", "rolls: spark", "2:8", "expected a list"),
        ("rolls: [spark, classifier]", "rolls:", "2:7", "rolls is empty"),
        ("rolls: [spark, classifier]\n", "", "1:1", "expected a line `rolls: …` here"),
        ("subnet: 10", "x: 10", "3:11", "expected only subnet"),
        ("spark, classifier", "spark, gpupt", "2:16", "not for nodes"),
        ("spark, classifier", "spark, gpupt", "2:16", "(gpupt: what a host is made of)"),
        ("    cpus: 2", "    cpus: 1.5", "8:11", "cpus of node compute-0 is 1.5"),
        ("    cpus: 2", "    cpus: '2'", "8:11", "cpus of node compute-0 is '2'"),
        ("disk: 20 GiB", "disk: big", "10:11", "'big' is not a size"),
        ("name: compute-0\n    ", "", "6:5", "in item 2 of nodes"),
    ],
)
def test_each_mistake_is_placed(old: str, new: str, place: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(BadInput) as caught:
        parse_specfile(
            GOOD.replace(old, new, 1),
            file="c.yaml",
            known_rolls=[*ROLLS, "gpupt"],
            host_rolls={"gpupt": "what a host is made of"},
        )
    said = str(caught.value)
    assert f"at c.yaml:{place}" in said, said
    assert words in said, said
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "[]", "cluster: [", "a: &x 1\nb: *x", "- 1\n", "\t"])
def test_what_is_no_spec_at_all(text: str) -> None:
    with pytest.raises(BadInput):
        parse_specfile(text, file="c.yaml", known_rolls=ROLLS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "it is a folder, not a file"),
        (b"cluster: \xff", "its byte 10 is none of UTF-8's"),
        (GOOD.encode() + b"---\ncluster: two\n", "a second document begins here"),
    ],
)
def test_what_cannot_be_read_is_said_in_words(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "c.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_specfile(file, known_rolls=ROLLS)
    assert words in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_subnet_too_small_for_the_nodes() -> None:
    nodes = "".join(
        f"  - {{name: c{number}, role: compute, cpus: 1, memory: 1 GiB}}\n" for number in range(6)
    )
    with pytest.raises(BadInput, match="no room for 9 nodes"):
        parse_specfile(
            GOOD.replace("10.71.5.0/24", "10.71.5.0/29") + nodes, file="c.yaml", known_rolls=ROLLS
        )


@pytest.mark.parametrize(
    ("text", "size"),
    [("64 KiB", 65536), ("3 GiB", 3 << 30), ("2560MiB", 2560 << 20), ("0.5 TiB", 1 << 39)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text())
def test_any_text_is_a_spec_or_bad_input(text: str) -> None:
    with suppress(BadInput):
        parse_specfile(text, file="c.yaml", known_rolls=ROLLS)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["cluster", "rolls", "network", "nodes", "name", "gpus", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_tree_is_a_spec_or_bad_input(tree: object) -> None:
    with suppress(BadInput):
        parse_specfile(json.dumps(tree), file="c.yaml", known_rolls=ROLLS)
