# SPDX-License-Identifier: Apache-2.0
"""Reads one TOML table key by key: every error names the place, the key, the value and what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from build_tools.errors import ManifestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAMES = {int: "an integer", str: "a string", bool: "true or false", float: "a number", list: "a list", dict: "a table"}
_MISSING: Any = object()


def read_toml(path: Path, shown: str) -> dict[str, Any]:
    """The file's table. `shown` is how errors call the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{shown}: cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{shown}: not valid TOML: {error}") from error


class Table:
    """A TOML table and where it stands. Take every key, then call finish()."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.where = where
        self._data = data
        self._known: list[str] = []

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raises an error about one key; `problem` says what is wrong and what is allowed."""
        value = f" = {self._data[key]!r}" if key in self._data else ""
        raise ManifestError(f"{self.where}: {key}{value}: {problem}")

    def take(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """The value of `key`, checked to be of type `kind` (float also takes an integer)."""
        self._known.append(key)
        if key not in self._data:
            if default is _MISSING:
                raise ManifestError(f"{self.where}: {key} is missing: add {key} = <{_NAMES[kind]}>")
            return default
        value = self._data[key]
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:  # bool is a subclass of int: no isinstance
            self.fail(key, f"expected {_NAMES[kind]}, not {_NAMES.get(type(value), type(value).__name__)}")
        return value

    def choice(self, key: str, allowed: Iterable[str], default: Any = _MISSING) -> str:
        """A string out of `allowed`."""
        value: str = self.take(key, str, default)
        allowed = list(allowed)
        if value not in allowed and key in self._data:
            self.fail(key, f"allowed: {', '.join(allowed)}")
        return value

    def at_least(self, key: str, low: int, default: Any = _MISSING) -> int:
        """An integer not below `low`."""
        value: int = self.take(key, int, default)
        if key in self._data and value < low:
            self.fail(key, f"expected an integer of at least {low}")
        return value

    def strings(self, key: str, default: Any = _MISSING, allowed: Iterable[str] | None = None) -> tuple[str, ...]:
        """A list of distinct strings, each out of `allowed` if that is given."""
        values = self.take(key, list, default)
        names = list(allowed) if allowed is not None else None
        for value in values:
            if type(value) is not str:
                self.fail(key, f"every item must be a string, {value!r} is not")
            if names is not None and value not in names:
                self.fail(key, f"{value!r} is unknown; allowed: {', '.join(names)}")
        if len(set(values)) != len(values):
            self.fail(key, "an item occurs twice")
        return tuple(values)

    def table(self, key: str, default: Any = _MISSING) -> Table:
        """A sub-table."""
        return Table(self.take(key, dict, default), f"{self.where}: {key}")

    def tables(self, key: str) -> list[dict[str, Any]]:
        """An array of tables; absent means empty."""
        items = self.take(key, list, [])
        if not all(type(item) is dict for item in items):
            self.fail(key, f"expected tables ([[{key}]])")
        return list(items)

    def keys(self) -> list[str]:
        """The keys the file has."""
        return list(self._data)

    def finish(self) -> None:
        """Refuses keys that were never asked for."""
        for key in self._data:
            if key not in self._known:
                self.fail(key, f"unknown key; allowed: {', '.join(self._known)}")
