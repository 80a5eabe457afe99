# SPDX-License-Identifier: Apache-2.0
"""Keeps compiled kernels under a hash of everything that can change them: sources, job, tools."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

from build_tools import toolchain
from build_tools.cubin import Facts
from build_tools.expand import Job

# Two threads in ast.parse may get SystemError, "recursion depth mismatch" (CPython issue 106905, seen in 3.11.7).
_PARSING = threading.Lock()
_INCLUDE = re.compile(rb'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)


def default_folder() -> Path:
    """$SAGERT_BUILD_CACHE, else a folder in the user's cache folder."""
    override = os.environ.get("SAGERT_BUILD_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "sagert-build"


def _parse(data: bytes) -> ast.Module:
    with _PARSING:
        return ast.parse(data)


def _imports(path: Path) -> list[Path]:
    names: list[str] = []
    for node in ast.walk(_parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return [path.parent / f"{name.split('.')[0]}.py" for name in names]


def _includes(path: Path, kernels: Path) -> list[Path]:
    names = [name.decode() for name in _INCLUDE.findall(path.read_bytes())]
    return [folder / name for name in names for folder in (path.parent, kernels / "common", kernels)]


@functools.cache
def source_digest(path: Path, kernels: Path) -> str:
    """What current_digest says when this build first asks."""
    return current_digest(path, kernels)


def current_digest(path: Path, kernels: Path) -> str:
    """Hash of a source and of every file of the kernels folder it imports or includes, however indirectly."""
    found: set[Path] = set()
    pending = [path.resolve()]
    while pending:
        current = pending.pop()
        if current in found or not current.is_file():
            continue
        found.add(current)
        following = _imports(current) if current.suffix == ".py" else _includes(current, kernels.resolve())
        pending += [other.resolve() for other in following]
    total = hashlib.sha256()
    for current in sorted(found):
        total.update(current.name.encode() + b"\0" + hashlib.sha256(_content(current)).digest())
    return total.hexdigest()


def _content(path: Path) -> bytes:
    """What of a source can matter: of Python, whose line numbers reach no cubin, not the comments and the layout."""
    data = path.read_bytes()
    return ast.dump(_parse(data)).encode() if path.suffix == ".py" else data


@functools.cache
def _own_digest(compiler: str) -> str:
    """Hash of the build tools that shape what is cached."""
    total = hashlib.sha256()
    used = {"triton": ("triton_worker.py", "compile_triton.py"), "cuda": ("compile_cuda.py",)}
    for name in (*used[compiler], "cubin.py"):
        total.update(Path(__file__).with_name(name).read_bytes())
    return total.hexdigest()


def key(job: Job, kernels: Path) -> str:
    """The name under which a job's result is kept."""
    tools = toolchain.triton_version() + (", " + toolchain.nvrtc_version() if job.compiler == "cuda" else "")
    parts = [
        job.digest(),
        source_digest(kernels / job.source.partition(":")[0], kernels),
        tools,
        _own_digest(job.compiler),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Cache:
    """A folder of results. Entries appear whole or not at all, so builds may run side by side or be interrupted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "cubins"

    def get(self, name: str) -> tuple[bytes, Facts] | None:
        """A result, or None; an entry that does not match its own checksum counts as absent."""
        entry = self._folder / name[:2] / name
        try:
            cubin = (entry / "kernel.cubin").read_bytes()
            data = json.loads((entry / "facts.json").read_text())
            if data["sha256"] != hashlib.sha256(cubin).hexdigest():
                return None
            return cubin, Facts.from_json(data["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, name: str, cubin: bytes, facts: Facts) -> None:
        """Keeps a result."""
        entry = self._folder / name[:2] / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
        try:
            (scratch / "kernel.cubin").write_bytes(cubin)
            data = {"sha256": hashlib.sha256(cubin).hexdigest(), "facts": dataclasses.asdict(facts)}
            (scratch / "facts.json").write_text(json.dumps(data))
            if self.get(name) is None:
                shutil.rmtree(entry, ignore_errors=True)
                os.replace(scratch, entry)
        except OSError:
            if self.get(name) is None:  # else another build put the same entry first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
