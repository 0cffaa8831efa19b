"""Floor 0: every error a person sees: what is wrong, with what evidence, what to do."""

from __future__ import annotations

from typing import ClassVar


class GpuptError(Exception):
    """An error for people; two errors with the same three texts are equal.

    ``brief`` says what is wrong in one line; ``details`` holds the evidence, a line each;
    ``remedy`` is what the reader can do or type.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, brief: str, *, details: tuple[str, ...] | str = (), remedy: str = ""
    ) -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = (details,) if isinstance(details, str) and details else tuple(details)
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.brief, *(f"  {line}" for line in self.details)]
        if self.remedy:
            lines.append(f"  → {self.remedy}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.brief!r}, {self.details!r}, {self.remedy!r})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, GpuptError)
        mine = (self.brief, self.details, self.remedy)
        return mine == (other.brief, other.details, other.remedy)

    def __hash__(self) -> int:
        return hash((type(self), self.brief, self.details, self.remedy))


class Failed(GpuptError):
    """A step was tried and did not succeed (exit 1)."""


class BadInput(GpuptError):
    """The command or a file given to it is wrong; nothing was touched (exit 2)."""

    exit_code = 2


class Refused(GpuptError):
    """The preflight found a reason not to start; nothing was touched (exit 3)."""

    exit_code = 3


class DeadlineExceeded(Failed):
    """A wait ended before what it waited for came."""
