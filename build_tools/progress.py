# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: one line that updates on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import TextIO


class Progress:
    """Counts finished kernels. Thread-safe."""

    def __init__(self, total: int, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._every = every
        self._tty = self._stream.isatty()
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()
        self._done = self._cached = 0

    def advance(self, name: str, cached: bool) -> None:
        """One kernel is done: compiled now, or taken from the cache."""
        with self._lock:
            self._done += 1
            self._cached += cached
            now = time.monotonic()
            line = f"[{self._done}/{self._total}] {name}"
            if self._tty:
                width = shutil.get_terminal_size().columns - 1
                self._stream.write(f"\r{line[:width]:<{width}}")
                self._stream.flush()
            elif not cached and now - self._last >= self._every:
                self._last = now
                self._stream.write(line + "\n")
                self._stream.flush()

    def finish(self) -> None:
        """Writes the summary."""
        if self._tty:
            self._stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        seconds = time.monotonic() - self._start
        compiled = self._done - self._cached
        self._stream.write(f"kernels: {compiled} compiled, {self._cached} from the cache, {seconds:.1f} s\n")
        self._stream.flush()
