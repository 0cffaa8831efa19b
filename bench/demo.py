#!/usr/bin/env python3
"""Where a demo's time went: each phase's share, from its summary.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from timing import HERE, ratio

CACHED, FROM_NOTHING = 15 * 60, 30 * 60  # seconds on 2 cores without KVM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("summary", nargs="?", type=Path, default=HERE / "demo-report/summary.json")
    file = parser.parse_args().summary
    if not file.exists():
        raise SystemExit(f"no {file}: run ./quickstart, or name a summary.json")
    summary = json.loads(file.read_text())
    whole = summary["seconds"] or 1
    host = "emulated host" if summary["host"]["emulated"] else "real host"
    print(f"{host}, {summary['host'].get('accelerator') or 'no accelerator known'}; {whole:.0f} s")
    for phase, seconds in sorted(summary["phases"].items(), key=lambda entry: -entry[1]):
        share = seconds / whole
        print(f"{phase:<16} {seconds:8.1f} s  {100 * share:5.1f} %  {'█' * round(40 * share)}")
    rest = whole - sum(summary["phases"].values())
    print(f"{'between phases':<16} {rest:8.1f} s  {100 * rest / whole:5.1f} %")
    ratio("whole demo / 15 min (images cached)", whole / CACHED, target="at most 1")
    ratio("whole demo / 30 min (from nothing)", whole / FROM_NOTHING, target="at most 1")


if __name__ == "__main__":
    main()
