# SPDX-License-Identifier: Apache-2.0
"""Errors the build reports to its user as one message, without a traceback."""


class BuildError(Exception):
    """Something the person who runs the build has to fix; the message says what and how."""


class ManifestError(BuildError):
    """A manifest says something it may not say."""


class CompileError(BuildError):
    """A compiler refused a kernel."""


class GateError(BuildError):
    """A compiled kernel is not what its manifest row promises."""
