# SPDX-License-Identifier: Apache-2.0
"""Bundles: the folders of compiled kernels, one per architecture."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from sagert import errors, native


@dataclass(frozen=True)
class Bundle:
    """One bundle; `problem` says what its files' check found wrong, None when every sha256 is right."""

    name: str
    target: str
    toolkit: str
    path: str
    driver_min: tuple[int, int]
    kernel_count: int
    bytes: int
    problem: str | None


def bundles(*, verify: bool = True) -> list[Bundle]:
    """Every bundle; with verify each file is hashed anew."""
    lib = native.library()
    result = []
    for index in range(lib.sagert_bundle_count()):
        raw = native.BundleStruct()
        native.check(lib.sagert_bundle_get(index, ctypes.byref(raw)))
        name, target, toolkit = raw.name.decode(), raw.target.decode(), raw.toolkit.decode()
        path = (raw.path or b"").decode()
        problem = None
        if verify:
            try:
                native.check(lib.sagert_bundle_verify(index))
            except errors.SagertError as error:
                problem = str(error)
        driver = (raw.driver_min // 1000, raw.driver_min % 1000 // 10)
        result.append(Bundle(name, target, toolkit, path, driver, raw.kernel_count, raw.bytes, problem))
    return result
