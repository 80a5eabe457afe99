# SPDX-License-Identifier: Apache-2.0
"""Importing: what it loads, what it costs, and that the layers import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Layer of each module: a module may import only from lower layers, or from its own package.
LAYERS = {
    "errors": 0,
    "version": 0,
    "codes": 1,
    "visibility": 1,
    "exponential": 1,
    "half_output": 1,
    "quantize": 1,
    "kv": 1,
    "settings": 2,
    "native": 2,
    "recipes": 2,
    "exact": 2,
    "options": 2,
    "fallback": 3,
    "environment": 3,
    "reference": 3,
    "reference_kv": 4,
    "registry": 4,
    "checks": 4,
    "sdpa": 4,
    "cpu": 5,
    "plans": 5,
    "launch": 6,
    "ops": 7,
    "calls": 8,
    "api": 9,
    "packed": 9,
    "quantized": 9,
    "selftest": 10,
    "verify": 10,
    "doctor": 11,
    "integrations": 11,
    "__main__": 12,
}


def python(code, environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tempfile.gettempdir(),  # -c looks in the current folder first
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules(root):
    package = root / "sagert"
    for path in sorted(package.rglob("*.py")):
        yield path, path.relative_to(package).with_suffix("").parts[0]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sagert":
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("sagert."):
                    yield alias.name.split(".")[1]


def test_layers_import_one_way(package_root):
    for path, name in modules(package_root):
        if name == "__init__":
            continue
        assert name in LAYERS, f"{path} has no layer"
        for other in imported(ast.parse(path.read_text())):
            assert other == name or LAYERS[other] < LAYERS[name], f"{path} imports {other}"


def test_no_assert_print_or_bare_except(package_root):
    for path, _ in modules(package_root):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), path
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path


def test_files_are_short_and_licensed(package_root):
    for path, _ in modules(package_root):
        lines = path.read_text().splitlines()
        assert lines[0] == "# SPDX-License-Identifier: Apache-2.0", path
        assert len(lines) <= 400, path
    assert len((package_root / "sagert" / "__init__.py").read_text().splitlines()) <= 80
    assert (package_root / "sagert" / "py.typed").exists()


def test_import_loads_neither_torch_nor_the_library(subprocess_environment):
    code = "import sys, sagert; print('torch' in sys.modules, 'sagert.native' in sys.modules)"
    assert python(code, subprocess_environment) == "False False"


def test_import_is_cheap_after_torch(subprocess_environment):
    pytest.importorskip("torch")
    code = (
        "import torch, time; t = time.process_time(); import sagert; sagert.attention;"
        "print(time.process_time() - t, torch.cuda.is_initialized())"
    )
    runs = [python(code, subprocess_environment).split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) <= 0.05
    assert all(initialised == "False" for _, initialised in runs)


def test_public_names_load_no_compiler(subprocess_environment):
    pytest.importorskip("torch")
    # torch._dynamo takes a second to import, and Triton with it: only compiled programs pay for them.
    code = "import sys, sagert; [getattr(sagert, n) for n in sagert.__all__]; print('torch._dynamo' in sys.modules)"
    assert python(code, subprocess_environment).strip() == "False"


def test_without_torch(subprocess_environment, library):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import sagert\n"
        "print(len(sagert.kernels()) > 0, bool(sagert.explain((1, 8, 1024, 128), device='9.0')))"
    )
    assert python(code, subprocess_environment) == "True True"


def test_public_names(subprocess_environment):
    pytest.importorskip("torch")
    code = "import sagert; print([name for name in sagert.__all__ if not hasattr(sagert, name)], dir(sagert) != [])"
    assert python(code, subprocess_environment) == "[] True"


def test_environment_variables(subprocess_environment):
    code = (
        "import sys\nfrom sagert.settings import SETTINGS\n"
        "print(SETTINGS.fallback, SETTINGS.precision, SETTINGS.strict, SETTINGS.log)"
    )
    environment = {
        **subprocess_environment,
        "SAGERT_FALLBACK": "sdpa",
        "SAGERT_PRECISION": "int8_fp8",
        "SAGERT_STRICT": "1",
        "SAGERT_LOG": "nonsense",
    }
    assert python(code, environment) == "sdpa int8_fp8 True None"
    assert python(code, subprocess_environment) == "None None False None"


def test_library_outside_the_package_is_refused(tmp_path, monkeypatch):
    from sagert import errors, native

    monkeypatch.setattr(native, "PACKAGE", tmp_path / "package")
    (tmp_path / "package" / "lib").mkdir(parents=True)
    with pytest.raises(errors.IntegrityError, match="missing"):
        native._load()
    outside = tmp_path / native.LIBRARY_NAME
    outside.write_bytes(b"not a library")
    (tmp_path / "package" / "lib" / native.LIBRARY_NAME).symlink_to(outside)
    with pytest.raises(errors.IntegrityError, match="outside the package"):
        native._load()


def test_damaged_library_is_an_integrity_error(tmp_path, monkeypatch):
    from sagert import errors, native

    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    (tmp_path / "lib").mkdir()
    (Path(tmp_path) / "lib" / native.LIBRARY_NAME).write_bytes(b"not a library")
    with pytest.raises(errors.IntegrityError, match="cannot be loaded"):
        native._load()
