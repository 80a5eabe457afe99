# SPDX-License-Identifier: Apache-2.0
"""Is a finished wheel fit to ship: its tag, its library's linkage and exports, its bundles, its RECORD, its size."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from build_tools.errors import BuildError
from build_tools.manifest import load

TAG = "py3-none-manylinux_2_28_x86_64"
GLIBC_FLOOR = (2, 28)
MAX_BYTES = 30_000_000
LIBRARY = "sagert/lib/libsagert.so"
_NEEDED = re.compile(r"(libc|libm|libdl|libpthread|ld-linux-x86-64)\.so\.\d+")
_DECLARED = re.compile(r"^SAGERT_API\s[^;(]*?\b(sagert_\w+)\(", re.MULTILINE)


class WheelError(BuildError):
    """The wheel must not be shipped; the message lists every reason."""


def declared_functions(header: Path) -> set[str]:
    """Names of the functions include/sagert.h declares."""
    return set(_DECLARED.findall(header.read_text(encoding="utf-8")))


def _tag(wheel: Path, archive: zipfile.ZipFile) -> list[str]:
    problems = []
    if not wheel.name.endswith(f"-{TAG}.whl"):
        problems.append(f"tag: the file is called {wheel.name}, expected ...-{TAG}.whl")
    metadata = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
    text = archive.read(metadata[0]).decode() if metadata else ""
    tags = re.findall(r"^Tag: (\S+)$", text, re.MULTILINE)
    if tags != [TAG]:
        problems.append(f"tag: WHEEL says {', '.join(tags) or 'nothing'}, expected {TAG}")
    return problems


def _library(data: bytes, wanted: set[str]) -> list[str]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection
    from elftools.elf.sections import SymbolTableSection

    try:
        elf = ELFFile(io.BytesIO(data))
        dynamic = elf.get_section_by_name(".dynamic")
        symbols = elf.get_section_by_name(".dynsym")
        versions = elf.get_section_by_name(".gnu.version_r")
    except ELFError as error:
        return [f"library: {LIBRARY} is no ELF file: {error}"]
    if not isinstance(dynamic, DynamicSection) or not isinstance(symbols, SymbolTableSection):
        return [f"library: {LIBRARY} is no shared library"]
    problems = []
    for tag in dynamic.iter_tags():
        kind = tag.entry.d_tag
        needed = str(getattr(tag, "needed", ""))
        if kind == "DT_NEEDED" and not _NEEDED.fullmatch(needed):
            problems.append(f"library: linked to {needed}; only libc, libm, libdl, libpthread and ld-linux may be")
        elif kind in ("DT_RPATH", "DT_RUNPATH"):
            problems.append(f"library: has {kind[3:]}, link it without")
    for library, auxiliaries in versions.iter_versions() if isinstance(versions, GNUVerNeedSection) else ():
        for auxiliary in auxiliaries:
            found = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", auxiliary.name)
            if found and tuple(map(int, found.groups())) > GLIBC_FLOOR:
                problems.append(f"library: needs {auxiliary.name} of {library.name}, at most 2.28 is allowed")
    exported = {
        symbol.name
        for symbol in symbols.iter_symbols()
        if symbol.name and symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK")
    }
    problems += [f"library: {name} is declared and not exported" for name in sorted(wanted - exported)]
    problems += [f"library: {name} is exported and not declared" for name in sorted(exported - wanted)]
    return problems


def _bundles(archive: zipfile.ZipFile, kernels: Path) -> list[str]:
    names = set(archive.namelist())
    problems = []
    for manifest in load(kernels):
        home = f"sagert/bundles/{manifest.arch.name}/"
        if home + "index.json" not in names:
            problems.append(f"bundle: {home}index.json is missing")
            continue
        try:
            index: dict[str, Any] = json.loads(archive.read(home + "index.json"))
            files = {home + entry["file"]: entry["sha256"] for entry in index["kernels"]}
            rows = [row["id"] for row in index["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"bundle: {home}index.json cannot be read: {error!r}")
            continue
        wanted = [row.id for row in manifest.rows if not row.trial]
        if rows != wanted:
            problems.append(f"bundle: {home}index.json has rows {rows}, the manifest {wanted}")
        for name, sha256 in files.items():
            if name not in names:
                problems.append(f"bundle: {name} is missing")
            elif hashlib.sha256(archive.read(name)).hexdigest() != sha256:
                problems.append(f"bundle: {name} does not have the sha256 its index.json says")
            elif not archive.read(name).startswith(b"\x7fELF"):
                problems.append(f"bundle: {name} is no machine code: build with 'bundles' or 'all', not with 'ptx'")
        extra = {name for name in names if name.startswith(home)} - files.keys() - {home + "index.json"}
        problems += [f"bundle: {name} is in no index" for name in sorted(extra)]
    return problems


def _table(archive: zipfile.ZipFile, library: bytes) -> list[str]:
    """The library refuses cubins of another build: both must come from the same one."""
    problems = []
    for name in archive.namelist():
        if name.endswith(".cubin") and hashlib.sha256(archive.read(name)).digest() not in library:
            problems.append(f"bundle: {name} is not the file libsagert was built for")
    return problems


def _record(archive: zipfile.ZipFile) -> list[str]:
    found = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
    if len(found) != 1:
        return [f"RECORD: {len(found)} of them, expected 1"]
    problems = []
    listed: dict[str, tuple[str, str]] = {}
    for row in csv.reader(io.StringIO(archive.read(found[0]).decode())):
        if len(row) != 3:
            problems.append(f"RECORD: malformed line {','.join(row)!r}")
            continue
        listed[row[0]] = (row[1], row[2])
    names = {name for name in archive.namelist() if not name.endswith("/")}
    problems += [f"RECORD: {name} is listed and not in the wheel" for name in sorted(listed.keys() - names)]
    for name in sorted(names):
        if name not in listed:
            problems.append(f"RECORD: {name} is not listed")
        elif name != found[0]:
            data = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            if listed[name] != (f"sha256={digest}", str(len(data))):
                problems.append(f"RECORD: {name} has another hash or length than listed")
    return problems


def check_wheel(wheel: Path, kernels: Path, header: Path) -> str:
    """One line about a good wheel. Raises WheelError with every problem of a bad one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            broken = archive.testzip()
            if broken:
                raise WheelError(f"{wheel.name}: {broken} is damaged")
            problems = _tag(wheel, archive)
            if LIBRARY in archive.namelist():
                library = archive.read(LIBRARY)
                problems += _library(library, declared_functions(header))
                problems += _table(archive, library)
            else:
                problems.append(f"library: {LIBRARY} is missing")
            problems += _bundles(archive, kernels)
            problems += _record(archive)
            cubins = sum(name.endswith(".cubin") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise WheelError(f"{wheel}: cannot be read: {error}") from error
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        problems.append(f"size: {size} bytes, at most {MAX_BYTES} are allowed")
    if problems:
        raise WheelError("\n".join(f"{wheel.name}: {problem}" for problem in problems))
    return f"{wheel.name}: good: {size / 1e6:.1f} MB, {cubins} cubins"
