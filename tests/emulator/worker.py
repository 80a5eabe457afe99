# SPDX-License-Identifier: Apache-2.0
"""A process whose driver is the emulating one, so that no other test finds a GPU that is none."""

from __future__ import annotations

import concurrent.futures
import ctypes
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

_driver: ctypes.CDLL | None = None


def _begin(environment: dict[str, str], driver: str) -> None:
    global _driver
    os.environ.update(environment)
    # Who later asks the loader for libcuda.so.1 gets the one that bears the name already.
    _driver = ctypes.CDLL(driver, ctypes.RTLD_GLOBAL)
    _driver.emulator_error.restype = ctypes.c_char_p


def driver() -> ctypes.CDLL:
    """The worker's driver."""
    assert _driver is not None
    return _driver


class Worker:
    """Runs functions in the process, one after the other; a new one where the last has died."""

    def __init__(self, environment: dict[str, str], driver: str) -> None:
        self._arguments = (environment, driver)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The function's result, or its exception."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(1, context, _begin, self._arguments)
        try:
            return self._pool.submit(function, *arguments, **options).result(timeout=300)
        except concurrent.futures.process.BrokenProcessPool:
            self._pool = None
            raise

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown()
