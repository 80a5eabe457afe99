# SPDX-License-Identifier: Apache-2.0
"""Runs `zig c++` with its arguments, from a place and with a cache that stay where they are.

zig compiles its C++ library once per cache (most of a minute) and knows it again by zig's own path. pip's build
isolation installs ziglang into a new folder for every wheel, so a copy in the build cache (hard links where possible)
is what runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a script by CMake

from build_tools.cache import default_folder
from build_tools.errors import BuildError


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def zig(folder: Path) -> Path:
    """The zig executable of the build cache `folder`, put there if need be."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise BuildError("ziglang is not installed: pip install ziglang (the version pinned in pyproject.toml)")
    home = folder / f"ziglang-{version('ziglang')}"
    if not (home / "zig").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder)) / "zig"
        try:
            shutil.copytree(Path(spec.origin).parent, scratch, copy_function=_link)
            os.replace(scratch, home)
        except OSError:
            if not (home / "zig").is_file():  # else another build was faster
                raise
        finally:
            shutil.rmtree(scratch.parent, ignore_errors=True)
    return home / "zig"


def main() -> None:
    """Replaces this process by zig."""
    folder = default_folder().resolve()
    try:
        command = str(zig(folder))
    except BuildError as error:
        sys.exit(f"error: {error}")
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    os.execve(command, [command, "c++", *sys.argv[1:]], {**os.environ, **caches})


if __name__ == "__main__":
    main()
