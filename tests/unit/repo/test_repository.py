# SPDX-License-Identifier: Apache-2.0
"""What the repository promises about itself: table, pins, licences, links, file sizes, one version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("*.py", "*.cc", "*.c", "*.h", "*.cu", "*.cuh", "*.toml", "*.yml", "*.cmake", "CMakeLists.txt", "Makefile")
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that match, and that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_support_table_follows_the_manifests() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "support_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_build_pins_are_the_same_in_both_places() -> None:
    lines = (ROOT / "requirements-build.txt").read_text(encoding="utf-8").splitlines()
    listed = {line.replace('"', "'") for line in lines if line and not line.startswith("#")}
    build_system = pyproject()["build-system"]
    assert isinstance(build_system, dict)
    assert {r.replace('"', "'") for r in build_system["requires"]} == listed


def test_every_development_requirement_is_pinned() -> None:
    for name in ("requirements-build.txt", "requirements-dev.txt", "examples/demo/requirements.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert "==" in line, f"{name}: {line}"


def test_every_source_names_its_licence() -> None:
    for path in tracked(*SOURCES):
        if "benchmarks/results" in path.as_posix() or not path.stat().st_size:
            continue
        head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:3])
        assert "SPDX-License-Identifier: Apache-2.0" in head, path.relative_to(ROOT)


def test_files_stay_small() -> None:
    for path in tracked("sagert/*.py", "build_tools/*.py", "kernels/*.py", "tests/*.py", "benchmarks/*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.relative_to(ROOT)
    for path in tracked("host/*.cc", "host/*.h", "kernels/*.cu", "kernels/*.cuh"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path.relative_to(ROOT)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_changelog_has_the_version() -> None:
    project = pyproject()["project"]
    assert isinstance(project, dict)
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflow_actions_are_pinned_by_commit() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        uses = re.findall(r"uses: *(\S+)", text)
        assert uses
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", use) for use in uses), uses
        assert "contents: read" in text
        assert text.count("persist-credentials: false") == text.count("actions/checkout@")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_what_runs_beside_the_wait_has_no_loads_that_may_move() -> None:
    """A scout waits for the pre-pass; `__ldg`, to the compiler of constant memory, can end up in front of that."""
    scout = ROOT / "kernels" / "sm90" / "scout.cuh"
    assert "__ldg" not in scout.read_text(encoding="utf-8")
