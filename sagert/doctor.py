# SPDX-License-Identifier: Apache-2.0
"""doctor: what this machine is, what this installation holds, and what runs, with a reason for the rest.

Works with no GPU, no driver, no torch, and even no library: each finding is collected on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from sagert import environment, native
from sagert.errors import SagertError
from sagert.registry import Bundle, Device, bundles, devices, kernels, support_table
from sagert.registry.device import driver_version
from sagert.version import version


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Result and None, or None and the error's text."""
    try:
        return function(), None
    except SagertError as error:
        return None, str(error)


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def _bundle(bundle: Bundle) -> dict[str, Any]:
    return {**asdict(bundle), "driver_min": _dotted(bundle.driver_min), "ok": bundle.problem is None}


def _device(device: Device) -> dict[str, Any]:
    return {
        **asdict(device),
        "capability": _dotted(device.capability),
        "driver": _dotted(device.driver),
    }


def _support(device: Device, present: bool) -> dict[str, Any]:
    cells = [asdict(cell) for cell in support_table(device)]
    return {
        "device": f"{device.ordinal}: {device.name}" if present else device.name,
        "capability": _dotted(device.capability),
        "driver": _dotted(device.driver),
        "present": present,
        "cells": cells,
    }


def _bundle_devices() -> list[Device]:
    """One invented device per capability that the rows start at, with a driver new enough for all of them."""
    rows = kernels()
    newest = max((row.driver_min for row in rows), default=(12, 0))
    newest = max(newest, (12, 9))
    return [
        Device(capability, newest, name=f"any device of capability {_dotted(capability)}")
        for capability in sorted({row.capability_min for row in rows})
    ]


def collect(*, selftest: bool = False) -> dict[str, Any]:
    """Everything doctor knows, as plain data; see `render` for the text form."""
    report: dict[str, Any] = {"schema": 1, "sagert": {"version": version(), "abi": native.ABI_VERSION}}
    report["platform"] = environment.platform_facts()
    report["torch"] = environment.torch_facts()
    lib, error = _attempt(native.library)
    report["library"] = {
        "path": str(native.library_path()),
        "version": lib.sagert_version().decode() if lib is not None else None,
        "error": error,
    }
    found: list[Device] = []
    report["driver"] = {"version": None, "error": "not asked: there is no library"}
    report["bundles"], report["support"] = [], []
    if lib is not None:
        driver, error = _attempt(driver_version)
        report["driver"] = {"version": _dotted(driver) if driver else None, "error": error}
        found, error = _attempt(devices)
        found = found or []
        if error and report["driver"]["error"] is None:
            report["driver"]["error"] = error
        report["bundles"] = [_bundle(bundle) for bundle in _attempt(bundles)[0] or []]
        shown = found or _attempt(_bundle_devices)[0] or []
        for device in shown:
            support, error = _attempt(partial(_support, device, bool(found)))
            if support is not None:
                report["support"].append(support)
    report["devices"] = [_device(device) for device in found]
    report["environment"] = environment.variables()
    report["other_packages"] = environment.other_packages()
    damaged = [bundle["name"] for bundle in report["bundles"] if not bundle["ok"]]
    serves = any(cell["row"] for table in report["support"] if table["present"] for cell in table["cells"])
    report["problems"] = _problems(report, damaged, serves)
    report["usable"] = serves and not report["problems"]
    if selftest:
        from sagert.selftest import run

        report["selftest"] = run(found) if found and report["torch"]["cuda_available"] else []
        if not report["selftest"]:
            report["problems"].append("the self-test needs a GPU that both torch and sagert can use")
        elif not all(result["ok"] for result in report["selftest"]):
            report["problems"].append("the self-test failed")
        report["usable"] = report["usable"] and not report["problems"]
    return report


def _problems(report: dict[str, Any], damaged: list[str], serves: bool) -> list[str]:
    """What stands between this machine and a quantized kernel; empty when nothing does."""
    problems = []
    if report["library"]["error"]:
        problems.append(report["library"]["error"])
        return problems
    if report["driver"]["error"]:
        problems.append(report["driver"]["error"])
    elif not report["devices"]:
        problems.append("the driver reports no device")
    elif not serves:
        problems.append("no device of this machine has a kernel row: see the table's reasons")
    if damaged:
        problems.append(f"damaged bundles: {', '.join(damaged)}; reinstall sagert")
    if report["torch"]["error"]:
        problems.append(f"torch: {report['torch']['error']}")
    elif report["torch"]["cuda_available"] is False:
        problems.append("this torch cannot use CUDA: install a CUDA build of torch that supports this driver")
    return problems


def _table(support: dict[str, Any]) -> list[str]:
    dims = sorted({cell["head_dim"] for cell in support["cells"]})
    lines = [
        f"  {support['device']} (capability {support['capability']}, driver {support['driver']})",
        "    " + "precision".ljust(12) + "".join(f"D={dim}".ljust(7) for dim in dims),
    ]
    reasons: dict[str, list[str]] = {}
    by_precision: dict[str, list[dict[str, Any]]] = {}
    for cell in support["cells"]:
        by_precision.setdefault(cell["precision"], []).append(cell)
        if cell["row"] is None:
            reasons.setdefault(cell["reason"], []).append(f"{cell['precision']} D={cell['head_dim']}")
    for precision, cells in by_precision.items():
        lines.append("    " + precision.ljust(12) + "".join(("yes" if c["row"] else "no").ljust(7) for c in cells))
    for reason, where in reasons.items():
        names = ", ".join(where) if len(where) <= 3 else f"{where[0]} and {len(where) - 1} more"
        lines.append(f"    no: {reason} [{names}]")
    return lines


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    host, torch, library, driver = report["platform"], report["torch"], report["library"], report["driver"]
    torch_text = f"{torch['version'] or torch['installed']} (CUDA {torch['cuda'] or 'none'})"
    lines = [
        f"sagert    {report['sagert']['version']} (ABI {report['sagert']['abi']})",
        f"platform  {host['system']} {host['machine']}" + (f", {host['libc']}" if host["libc"] else ""),
        f"python    {host['python']} {host['implementation']}",
        f"torch     {torch['error'] or torch_text}",
        f"library   {library['error'] or library['version'] + ' at ' + library['path']}",
        f"driver    {driver['error'] or 'CUDA ' + driver['version']}",
        "",
        "devices" if report["devices"] else "devices: none",
    ]
    for device in report["devices"]:
        lines.append(
            f"  {device['ordinal']}: {device['name']}, capability {device['capability']}, "
            f"{device['multiprocessors']} SMs, {device['memory'] / 2**30:.0f} GiB"
        )
    lines += ["", "bundles" if report["bundles"] else "bundles: none"]
    for bundle in report["bundles"]:
        state = "sha256 ok" if bundle["ok"] else f"DAMAGED: {bundle['problem']}"
        lines.append(
            f"  {bundle['name']}: {bundle['kernel_count']} kernels for {bundle['target']}, "
            f"{bundle['bytes'] / 2**20:.1f} MiB, toolkit {bundle['toolkit']}, "
            f"driver {bundle['driver_min']} or later, {state}"
        )
    if report["support"]:
        lines += ["", "support (bf16)" if report["devices"] else "support (bf16), by bundle"]
        for support in report["support"]:
            lines += _table(support)
    lines += ["", "environment"]
    for variable in report["environment"]:
        value = "unset" if variable["value"] is None else repr(variable["value"])
        lines.append(f"  {variable['name']}: {value} ({variable['meaning']})")
    others = ", ".join(f"{name} {found}" for name, found in report["other_packages"].items())
    lines += ["", f"other attention packages: {others or 'none'}"]
    if "selftest" in report:
        lines += ["", "self-test" if report["selftest"] else "self-test: not run"]
        for result in report["selftest"]:
            verdict = "ok" if result["ok"] else f"FAILED: {result['error'] or 'error above the limit'}"
            figures = ""
            if result["relative_l1"] is not None:
                figures = f"error {result['relative_l1']:.5f} (limit {result['limit']:.4f}), "
                figures += f"{result['milliseconds']:.3f} ms, "
            lines.append(f"  {result['device']} {result['row']} {result['case']}: {figures}{verdict}")
    lines += ["", "usable: yes" if report["usable"] else "usable: no"]
    lines += [f"  - {problem}" for problem in report["problems"]]
    return "\n".join(lines)
