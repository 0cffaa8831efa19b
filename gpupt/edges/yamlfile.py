"""The gate to YAML: every value keeps the line and column it came from, for errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import yaml

from gpupt.errors import BadInput


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file, counted from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Value:
    """One YAML value and its place; the readers below raise BadInput that names the place."""

    node: yaml.Node
    file: str
    path: str = ""  # such as nodes[1].cpus, counted from 0
    said: str = ""  # the same for people: cpus of node compute-0

    @property
    def where(self) -> Where:
        mark = self.node.start_mark
        return Where(self.file, mark.line + 1, mark.column + 1)

    @property
    def called(self) -> str:
        """What people call it."""
        return self.said or "the file"

    def wrong(self, brief: str, *, expected: str = "", remedy: str = "") -> NoReturn:
        """Refuse this value, naming file, line and column."""
        details = [f"at {self.where}"] + ([f"in {self.said}"] if self.said else [])
        if expected:
            details.append(f"expected {expected}")
        raise BadInput(brief, details=tuple(details), remedy=remedy)

    def fields(self, *known: str, required: tuple[str, ...] = ()) -> dict[str, Value]:
        """The mapping's values by key; refuses unknown, repeated and missing keys."""
        if not isinstance(self.node, yaml.MappingNode):
            self.wrong(f"{self.called} is {self._kind()}", expected="a mapping")
        found: dict[str, Value] = {}
        for key, value in self.node.value:
            at = Value(key, self.file, self.path, self.said)
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name not in known:
                near = get_close_matches(name, known, 1)
                at.wrong(
                    f"unknown key {name!r}",
                    expected=f"{'one of ' if len(known) > 1 else 'only '}{', '.join(known)}",
                    remedy=f"did you mean {near[0]!r}?" if near else "",
                )
            if name in found:
                at.wrong(f"key {name!r} stands here a second time")
            said = f"{name} of {self.said}" if self.said else name
            found[name] = Value(value, self.file, f"{self.path}.{name}".lstrip("."), said)
        for name in required:
            if name not in found:
                self.wrong(f"key {name!r} is missing", expected=f"a line `{name}: …` here")
        return found

    def entries(self) -> dict[str, Value]:
        """The mapping's values by key, whatever the keys are; refuses repeated ones."""
        if not isinstance(self.node, yaml.MappingNode):
            self.wrong(f"{self.called} is {self._kind()}", expected="a mapping")
        return self.fields(*(str(key.value) for key, _ in self.node.value))

    def items(self) -> Iterator[Value]:
        """The sequence's values."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.wrong(f"{self.called} is {self._kind()}", expected="a list")
        for number, value in enumerate(self.node.value):
            yield Value(value, self.file, f"{self.path}[{number}]", self._said_of(number, value))

    def _said_of(self, number: int, item: yaml.Node) -> str:
        """What people call an item: by its name where it has one, else counted from 1."""
        for key, value in item.value if isinstance(item, yaml.MappingNode) else ():
            if key.value == "name" and isinstance(value, yaml.ScalarNode) and value.value.strip():
                kind, _, of = self.said.partition(" of ")
                return f"{kind.removesuffix('s')} {value.value}{of and f' of {of}'}"
        return f"item {number + 1}{self.said and f' of {self.said}'}"

    @property
    def is_list(self) -> bool:
        return isinstance(self.node, yaml.SequenceNode)

    @property
    def tag(self) -> str:
        """The scalar's YAML type: str, int, float, bool, null, timestamp; or map, seq."""
        return str(self.node.tag).rpartition(":")[2]

    def text(self) -> str:
        """A non-empty scalar as it is written; numbers are taken as the text they are."""
        if not isinstance(self.node, yaml.ScalarNode) or self.tag in {"null", "bool"}:
            self.wrong(f"{self.called} is {self._kind()}", expected="text")
        if not self.node.value.strip():
            self.wrong(f"{self.called} is empty", expected="text")
        return str(self.node.value)

    def whole(self, *, least: int, most: int) -> int:
        """A whole number within bounds."""
        if not isinstance(self.node, yaml.ScalarNode) or self.tag != "int":
            self.wrong(
                f"{self.called} is {self._kind()}", expected=f"a whole number, {least} to {most}"
            )
        try:
            number = int(self.node.value, 0)
        except ValueError:
            self.wrong(f"{self.called} is not a whole number", expected=f"{least} to {most}")
        if not least <= number <= most:
            self.wrong(f"{self.called} is {number}", expected=f"{least} to {most}")
        return number

    def _kind(self) -> str:
        if isinstance(self.node, yaml.MappingNode):
            return "a mapping"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        if self.tag == "null":
            return "empty" if not self.node.value else str(self.node.value)
        # Quotes tell text from what YAML took for a number.
        return f"{self.node.value!r}" if self.tag == "str" else str(self.node.value)


def read_yaml(file: Path) -> Value:
    """The one document of a file; raises BadInput with file, line and column."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"no such file: {file}") from None
    except IsADirectoryError:
        raise BadInput(f"cannot read {file}", details="it is a folder, not a file") from None
    except UnicodeDecodeError as error:
        byte = f"its byte {error.start + 1} is none of UTF-8's"
        raise BadInput(f"{file} is not text", details=byte) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(f"cannot read {file}", details=why[:1].lower() + why[1:]) from None
    return parse_yaml(text, file=str(file))


def parse_yaml(text: str, *, file: str) -> Value:
    """The one document of a text; aliases, tags and a second document are refused."""
    try:
        if any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise BadInput(f"{file} uses YAML aliases", remedy="write the values out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Where(file, mark.line + 1, mark.column + 1) if mark else file
        if error.problem == "but found another document":
            raise BadInput(
                "a second document begins here",
                details=f"at {place}",
                remedy="keep one document a file, and leave out the line `---` between them",
            ) from None
        raise BadInput("not YAML", details=(f"at {place}", str(error.problem or ""))) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{file} is not YAML", details=str(error)) from None
    if node is None:
        raise BadInput(f"{file} is empty")
    return Value(node, file)
