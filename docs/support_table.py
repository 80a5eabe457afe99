# SPDX-License-Identifier: Apache-2.0
"""Writes the README's support table from the kernel manifests: `python docs/support_table.py [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN = "<!-- support table: written by docs/support_table.py -->"
END = "<!-- end of support table -->"


def manifests() -> list[dict[str, Any]]:
    """The architectures' manifests without rows on trial, which no wheel has, lowest capability first."""
    found = []
    for path in (ROOT / "kernels").glob("*/manifest.toml"):
        manifest = tomllib.loads(path.read_text(encoding="utf-8"))
        if "arch" in manifest:
            manifest["row"] = [row for row in manifest.get("row", []) if not row.get("trial")]
            found.append(manifest)
    return sorted(found, key=lambda m: [tuple(map(int, c.split("."))) for c in m["arch"]["runs_on"]])


def serving(arch: dict[str, Any], all_of_them: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that serve all devices of an architecture: its own, and others' whose cubins run there too."""

    def numbers(runs_on: list[str]) -> list[tuple[int, ...]]:
        return [tuple(map(int, capability.split("."))) for capability in runs_on]

    low, high = numbers(arch["runs_on"])
    found = []
    for manifest in all_of_them:
        for row in manifest["row"]:
            first, last = numbers(row.get("runs_on", manifest["arch"]["runs_on"]))
            if first <= low and high <= last:
                found.append(row)
    return found


def capabilities(arch: dict[str, Any]) -> str:
    low, high = arch["runs_on"]
    return low if low == high else f"{low} to {high}"


def cell(rows: list[dict[str, Any]]) -> str:
    """What the preferred row of a precision promises, and the head dims and masks that any of them takes."""
    if not rows:
        return "no"
    row = min(rows, key=lambda r: r["rank"])
    widest = max(r["requires"]["head_dim_max"] for r in rows)
    masks = "" if any("mask" in r["requires"]["flags"] for r in rows) else ", no masks"
    return f"{row['accuracy']['class']}, {row['accuracy']['rel_l1_randn']}, D <= {widest}{masks}"


def render() -> str:
    """The table and, below it, why a precision is absent, in Markdown."""
    all_of_them = manifests()
    precisions = list(dict.fromkeys(r["precision"] for m in all_of_them for r in m.get("row", [])))
    lines = [
        "| bundle | compute capability | driver (CUDA) | " + " | ".join(f"`{p}`" for p in precisions) + " |",
        "|---" * (3 + len(precisions)) + "|",
    ]
    absences: dict[str, list[str]] = {}
    for manifest in all_of_them:
        arch = manifest["arch"]
        rows = serving(arch, all_of_them)
        cells = [cell([r for r in rows if r["precision"] == p]) for p in precisions]
        driver = f"{arch['driver_min'] // 1000}.{arch['driver_min'] % 1000 // 10}"
        lines.append(f"| {arch['name']} | {capabilities(arch)} | {driver} | " + " | ".join(cells) + " |")
        for absent in manifest.get("absent", []):
            absences.setdefault(f"`{absent['precision']}`: {absent['reason']}", []).append(arch["name"])
    if absences:
        lines += ["", "Not there, and why:", ""]
        lines += [f"- {', '.join(names)}: {what}" for what, names in absences.items()]
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """`readme` with the section between the markers written anew."""
    head, _, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{render()}{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is out of date")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if args.check:
        if old != new:
            sys.stderr.write("README.md's support table is out of date: run python docs/support_table.py\n")
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
