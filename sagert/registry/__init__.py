# SPDX-License-Identifier: Apache-2.0
"""Python face of the registry: which kernel rows exist, and which one serves a call or why none does."""

from sagert.registry.bundles import Bundle, bundles
from sagert.registry.device import Device, current_device, devices, parse_capability, parse_driver
from sagert.registry.rows import Row, kernels
from sagert.registry.selection import Selection, explain
from sagert.registry.support import Support, support_table

__all__ = [
    "Bundle",
    "Device",
    "Row",
    "Selection",
    "Support",
    "bundles",
    "current_device",
    "devices",
    "explain",
    "kernels",
    "parse_capability",
    "parse_driver",
    "support_table",
]
