# SPDX-License-Identifier: Apache-2.0
"""The version of the installed distribution."""

from __future__ import annotations


def version() -> str:
    """Version of the installed wheel, or "0+unknown" in a source tree that is not installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("sagert")
    except PackageNotFoundError:
        return "0+unknown"
