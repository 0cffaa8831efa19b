#!/usr/bin/env python3
"""Draws what a command printed as an SVG terminal: record.py LOG SVG [--command LINE] [--last N].

The picture asks nothing of the network: the web fonts that rich names are left out.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text


def draw(lines: list[str], *, title: str, command: str, width: int = 110) -> str:
    """The SVG of those lines under a prompt with the command."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "green"), (command, "bold")))
    for line in lines:
        text = Text.from_ansi(line)
        text.highlight_regex(r"^\[ *\d+ s\] [\w ]+", "bold cyan")
        text.highlight_regex(r"^✓.*", "green")
        text.highlight_regex(r"^(OK|ok):?.*", "bold green")
        console.print(text, soft_wrap=False, overflow="ellipsis", no_wrap=True)
    svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--command", default="./quickstart")
    parser.add_argument("--last", type=int, default=200, help="how many lines, from the end")
    given = parser.parse_args()
    lines = given.log.read_text(errors="replace").splitlines()
    lines = [line for line in lines if not re.search(r"\bwaiting for\b", line)][-given.last :]
    given.svg.write_text(draw(lines, title="gpupt", command=given.command))


if __name__ == "__main__":
    main()
