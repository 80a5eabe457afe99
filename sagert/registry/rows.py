# SPDX-License-Identifier: Apache-2.0
"""Kernel rows: the lines of the architectures' manifests, as compiled into the library."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import Any

from sagert import native
from sagert.codes import ACCURACY_NAMES, DTYPE_NAMES, PRECISION_NAMES, flag_names


@dataclass(frozen=True)
class Row:
    """One kernel row.

    capability_min and capability_max are (major, minor), inclusive; driver_min is the CUDA version of the oldest
    driver, (major, minor); relative_l1 is the tolerated error on N(0, 1) inputs against float64 attention; flags are
    the options it serves beyond plain attention; a lower rank is preferred.
    """

    id: str
    bundle: str
    family: str
    precision: str
    accuracy: str
    rank: int
    capability_min: tuple[int, int]
    capability_max: tuple[int, int]
    driver_min: tuple[int, int]
    flags: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dim_max: int
    relative_l1: float
    axes: dict[str, Any]
    quant: dict[str, Any]


def row_at(index: int) -> Row:
    """Row by its number in the library."""
    raw = native.RowStruct()
    native.check(native.library().sagert_row_get(index, ctypes.byref(raw)))
    return Row(
        id=raw.id.decode(),
        bundle=raw.bundle.decode(),
        family=raw.family.decode(),
        precision=PRECISION_NAMES.get(raw.precision, str(raw.precision)),
        accuracy=ACCURACY_NAMES.get(raw.accuracy, str(raw.accuracy)),
        rank=raw.rank,
        capability_min=divmod(raw.capability_min, 10),
        capability_max=divmod(raw.capability_max, 10),
        driver_min=(raw.driver_min // 1000, raw.driver_min % 1000 // 10),
        flags=flag_names(raw.flags),
        dtypes=tuple(name for code, name in DTYPE_NAMES.items() if raw.dtypes >> code & 1),
        head_dim_max=raw.head_dim_max,
        relative_l1=raw.rel_l1_randn,
        axes=json.loads(raw.axes_json or b"{}"),
        quant=json.loads(raw.quant_json or b"{}"),
    )


def kernels() -> list[Row]:
    """Every kernel row of this installation, whatever the machine; needs neither torch nor a GPU."""
    return [row_at(index) for index in range(native.library().sagert_row_count())]
