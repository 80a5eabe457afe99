# SPDX-License-Identifier: Apache-2.0
"""Devices: the machine's own, or described by capability and driver version where there is none."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

from sagert import errors, native

DEFAULT_DRIVER = (12, 9)


@dataclass(frozen=True)
class Device:
    """What selection looks at: compute capability and CUDA version of the driver, each (major, minor)."""

    capability: tuple[int, int]
    driver: tuple[int, int] = DEFAULT_DRIVER
    ordinal: int = 0
    name: str = "described device"
    multiprocessors: int = 0
    memory: int = 0
    shared_memory: int = 0
    uuid: str = ""

    def to_native(self) -> native.DeviceStruct:
        """The struct the library takes."""
        return native.DeviceStruct(
            ordinal=self.ordinal,
            capability=10 * self.capability[0] + self.capability[1],
            driver_version=1000 * self.driver[0] + 10 * self.driver[1],
            multiprocessors=self.multiprocessors,
            shared_memory=self.shared_memory,
            memory=self.memory,
            name=self.name.encode()[:127],
        )


def _pair(argument: str, value: str | float | tuple[int, int], example: str) -> tuple[int, int]:
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, int) for part in value):
        return value
    match = re.fullmatch(r"(\d+)\.(\d+)", str(value))
    if match is None:
        raise errors.InvalidArgumentError(f"{argument}={value!r} is not a version: write it as {example!r}")
    return int(match[1]), int(match[2])


def parse_capability(value: str | float | tuple[int, int]) -> tuple[int, int]:
    """ "9.0" or (9, 0) -> (9, 0)."""
    return _pair("capability", value, "9.0")


def parse_driver(value: str | float | tuple[int, int]) -> tuple[int, int]:
    """CUDA version of a driver: "12.8" or (12, 8) -> (12, 8)."""
    return _pair("driver", value, "12.8")


def driver_version() -> tuple[int, int]:
    """CUDA version of the installed driver; NoDriverError without one."""
    version = ctypes.c_int32()
    native.check(native.library().sagert_driver_version(ctypes.byref(version)))
    return version.value // 1000, version.value % 1000 // 10


def device_at(ordinal: int) -> Device:
    """The machine's device of that CUDA ordinal; NoDriverError without a driver."""
    raw = native.DeviceStruct()
    native.check(native.library().sagert_device_get(ordinal, ctypes.byref(raw)))
    return Device(
        capability=divmod(raw.capability, 10),
        driver=(raw.driver_version // 1000, raw.driver_version % 1000 // 10),
        ordinal=raw.ordinal,
        name=raw.name.decode("utf-8", "replace"),
        multiprocessors=raw.multiprocessors,
        memory=raw.memory,
        shared_memory=raw.shared_memory,
        uuid=bytes(raw.uuid).hex(),
    )


def devices() -> list[Device]:
    """Every device of this machine; NoDriverError without a driver."""
    count = ctypes.c_int32()
    native.check(native.library().sagert_device_count(ctypes.byref(count)))
    return [device_at(ordinal) for ordinal in range(count.value)]


def current_device() -> Device:
    """torch's current CUDA device if torch has been initialised on one, else the machine's first.

    NoDriverError asks for device= where there is none.
    """
    import sys

    torch = sys.modules.get("torch")
    ordinal = torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0
    try:
        return device_at(ordinal)
    except errors.NoDriverError as error:
        raise errors.NoDriverError(
            f'{error}. Describe a device instead, such as device="9.0" or device=sagert.Device((9, 0), driver=(12, 8))'
        ) from error
