# SPDX-License-Identifier: Apache-2.0
"""Build tools of sagert: manifests to cubins, bundles, the kernel table of libsagert and the wheel.

Never imported by the installed package. `python -m build_tools --help` explains the commands.
"""
