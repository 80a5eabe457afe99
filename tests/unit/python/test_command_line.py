# SPDX-License-Identifier: Apache-2.0
"""The command line and explain(): no GPU, no driver, no torch, no library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile

import pytest

REPORT_KEYS = [
    "schema", "sagert", "platform", "torch", "library", "driver", "bundles", "support", "devices", "environment",
    "other_packages", "problems", "usable",
]  # fmt: skip


def command(environment, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "sagert", *arguments],
        env=environment,
        cwd=tempfile.gettempdir(),  # -m looks in the current folder first
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code != 2 else done.stderr


@pytest.fixture
def no_driver(subprocess_environment, library):
    from sagert import errors
    from sagert.registry import devices

    try:
        if devices():
            pytest.skip("this machine has a GPU")
    except errors.NoDriverError:
        pass
    return subprocess_environment


def test_help(subprocess_environment):
    text = command(subprocess_environment, "--help")
    for name in ("doctor", "explain", "list", "verify"):
        assert name in text
    for name in ("doctor", "explain", "list", "verify"):
        assert "--json" in command(subprocess_environment, name, "--help")


def test_a_reader_that_stops_early_is_no_error(subprocess_environment, library):
    process = subprocess.Popen(
        [sys.executable, "-m", "sagert", "list"],
        env=subprocess_environment,
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


def test_doctor_without_a_driver(no_driver):
    report = json.loads(command(no_driver, "doctor", "--json", code=1))
    assert list(report) == REPORT_KEYS
    assert report["usable"] is False
    assert report["devices"] == []
    assert report["driver"]["error"]
    assert report["library"]["error"] is None
    assert report["bundles"]
    assert all(bundle["ok"] and bundle["kernel_count"] > 0 for bundle in report["bundles"])
    for table in report["support"]:
        assert not table["present"]
        assert all(cell["row"] or cell["reason"] for cell in table["cells"])
        assert any(cell["row"] for cell in table["cells"])


def test_doctor_text(no_driver):
    text = command(no_driver, "doctor", code=1)
    for word in ("sagert ", "platform", "python", "torch", "driver", "bundles", "sha256 ok", "int8_fp8", "usable: no"):
        assert word in text
    for name in ("SAGERT_LOG", "SAGERT_FALLBACK", "SAGERT_PRECISION", "SAGERT_STRICT"):
        assert name in text


def test_doctor_selftest_without_a_gpu(no_driver):
    report = json.loads(command(no_driver, "doctor", "--json", "--selftest", code=1))
    assert report["selftest"] == []
    assert any("self-test" in problem for problem in report["problems"])


def test_doctor_names_unknown_variables(no_driver):
    text = command({**no_driver, "SAGERT_FALBACK": "sdpa"}, "doctor", code=1)
    assert "SAGERT_FALBACK: 'sdpa' (not a variable of sagert)" in text


def test_doctor_without_the_library(subprocess_environment, package_root, tmp_path):
    ignore = shutil.ignore_patterns("lib", "bundles", "__pycache__")
    shutil.copytree(package_root / "sagert", tmp_path / "sagert", ignore=ignore)
    environment = {**subprocess_environment, "PYTHONPATH": str(tmp_path)}
    report = json.loads(command(environment, "doctor", "--json", code=1))
    assert list(report) == REPORT_KEYS
    assert "missing" in report["library"]["error"]
    assert "usable: no" in command(environment, "doctor", code=1)
    assert "missing" in command(environment, "list", code=2)


def test_doctor_without_torch(no_driver, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    environment = {**no_driver, "PYTHONPATH": f"{tmp_path}:{no_driver['PYTHONPATH']}"}
    report = json.loads(command(environment, "doctor", "--json", code=1))
    assert report["torch"]["error"]
    assert report["bundles"]


def test_doctor_with_a_damaged_bundle(no_driver, package_root, tmp_path):
    shutil.copytree(package_root / "sagert", tmp_path / "sagert", ignore=shutil.ignore_patterns("__pycache__"))
    cubin = next((tmp_path / "sagert" / "bundles").rglob("*.cubin"))
    data = bytearray(cubin.read_bytes())
    data[len(data) // 2] ^= 1
    cubin.chmod(0o644)
    cubin.write_bytes(data)
    environment = {**no_driver, "PYTHONPATH": str(tmp_path)}
    report = json.loads(command(environment, "doctor", "--json", code=1))
    damaged = [bundle for bundle in report["bundles"] if not bundle["ok"]]
    assert len(damaged) == 1
    assert cubin.name in damaged[0]["problem"]
    assert cubin.name in command(environment, "verify", code=1)


def test_list(subprocess_environment, library):
    rows = json.loads(command(subprocess_environment, "list", "--json"))
    assert rows
    for row in rows:
        assert row["id"] in command(subprocess_environment, "list")
        assert row["precision"]
        assert row["head_dim_max"] >= 64


def test_explain_command(subprocess_environment, library):
    arguments = ("explain", "--shape", "1,32,4096,128", "--device-capability", "9.0", "--driver", "12.8")
    answer = json.loads(command(subprocess_environment, *arguments, "--json"))
    assert answer["row"]
    assert "selected" in command(
        subprocess_environment, *arguments, "--causal", "--lse", "--kv-heads", "8", "--sk", "77"
    )
    wide = ("--window", "64,0", "--bottom-right", "--dv", "64")
    assert "general" in command(subprocess_environment, *arguments, *wide, "--mask", "fp32")
    assert "general" in command(subprocess_environment, *arguments, *wide, "--varlen")
    assert "drop one" in command(subprocess_environment, *arguments, "--mask", "fp32", "--varlen", code=2)
    assert "LEFT,RIGHT" in command(subprocess_environment, *arguments, "--window", "64", code=2)
    old = command(subprocess_environment, *arguments[:-1], "11.8", code=1)
    assert "driver" in old
    assert "B,H,S,D" in command(subprocess_environment, "explain", "--shape", "1,2,3", code=2)
    bad = command(subprocess_environment, *arguments[:3], "--device-capability", "hopper", code=2)
    assert "hopper" in bad


def test_explain_without_a_device_asks_for_one(no_driver):
    from sagert import errors, explain

    with pytest.raises(errors.NoDriverError, match="device="):
        explain((1, 8, 1024, 128))


def test_explain_takes_tensors_and_shapes(library):
    torch = pytest.importorskip("torch")
    from sagert import Device, explain

    device = Device((9, 0), (12, 8))
    q = torch.empty(1, 8, 1024, 128, dtype=torch.float16, device="meta")
    assert explain(q, device=device).row == explain((1, 8, 1024, 128), dtype="fp16", device=device).row
    assert explain(q.transpose(1, 2), layout="BSHD", device="9.0").request == explain(q, device="9.0").request
    refused = explain(q, q.new_empty(1, 8, 99, 128), precision="nvfp4", attn_mask=True, device=device)
    assert not refused
    assert refused.hint
    assert all(refused.reasons.values())
    assert "nearest" in str(refused)
    assert not explain(q.clone().requires_grad_(), device=device)
    assert not explain(q, dropout_p=0.5, device=device)
    assert explain(q.float(), device=device).row == explain(q.bfloat16(), device=device).row  # computed through it


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"attn_mask": True}, ["mask"]),
        ({"attn_mask": "float32", "is_causal": True}, ["causal", "mask"]),
        ({"window": (None, 5)}, ["window"]),
        ({"window": (None, None), "causal_alignment": "bottom_right"}, []),
        ({"window": (7, 0), "causal_alignment": "bottom_right"}, ["window", "bottom_right"]),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, ["causal", "bottom_right"]),
        ({"varlen": True, "return_lse": True}, ["lse", "varlen"]),
        ({"fallback": "sdpa", "out": None, "scale": 0.3, "enable_gqa": True}, []),
    ],
)
def test_explain_takes_every_feature(options, flags, library):
    from sagert import explain

    answer = explain((2, 8, 1024, 128), (2, 2, 999, 128), (2, 2, 999, 64), device="9.0", **options)
    request = answer.request
    assert set(request["flags"]) == set(flags)
    assert request["head_dim_v"] == 64


def test_explain_takes_a_quantized_kv(library):
    torch = pytest.importorskip("torch")
    from sagert import QuantizedKV, explain, kernels

    for row, kernel in enumerate(kernels()):
        if kernel.capability_min != (9, 0) or kernel.precision != "int8_fp8":
            continue
        data = torch.empty(8, dtype=torch.uint8, device="meta")
        kv = QuantizedKV(data, None, (1, 8, 512, 64), 64, torch.bfloat16, "int8_fp8", row, True, False)
        answer = explain((1, 8, 77, 64), kv, device="9.0")
        assert answer.row in (kernel.id, None)
        assert all(not reasons for name, reasons in answer.reasons.items() if name == answer.row)
        assert any("row" in reason for name, reasons in answer.reasons.items() for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        (((1, 8, 128, 64),), {"attn_mask": "int8"}, "int8"),
        (((1, 8, 128, 64),), {"window": (1, -2)}, "right is -2"),
        (((1, 8, 128, 64),), {"causal_alignment": "left"}, "causal_alignment='left'"),
        (((1, 8, 128),), {}, "3 dimensions"),
        (((1, 8, 128, 64),), {"layout": "HND"}, "layout"),
        (((1, 8, 128, 64),), {"precision": "fp3"}, "fp3"),
        (((1, 8, 128, 64),), {"dtype": "int8"}, "int8"),
        (((1, 8, 128, 64),), {"device": "new"}, "new"),
        (((1, 8, 128, 64),), {"device": [9]}, "sagert.Device"),
    ],
)
def test_explain_malformed(arguments, options, word, library):
    from sagert import errors, explain

    with pytest.raises(errors.InvalidArgumentError, match=word):
        explain(*arguments, **{"device": "9.0", **options})


def test_kernels_and_support_table_agree(library):
    from sagert.registry import Device, kernels, support_table

    rows = kernels()
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert row.capability_min <= row.capability_max
        assert row.accuracy in ("high", "standard", "low")
        assert 0 < row.relative_l1 < 1
        assert {"float16", "bfloat16"} >= set(row.dtypes)
        cells = support_table(Device(row.capability_min, max(row.driver_min, (12, 0))))
        assert any(cell.precision == row.precision and cell.row is not None for cell in cells)
