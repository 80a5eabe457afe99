# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the stub of the driver, and a recorder in the place of the library for CPU tensors on the CUDA path."""

import pytest

from tests.kit.fixtures import compiler, stub  # noqa: F401


@pytest.fixture
def recorder(monkeypatch):
    """recorder(**answers) installs and returns a tests.kit.recorder.Recorder."""
    from sagert import native, plans
    from tests.kit.recorder import Recorder

    def install(**answers):
        lib = Recorder(**answers)
        monkeypatch.setattr(native, "_lib", lib)
        monkeypatch.setattr(plans, "stream_of", lambda index: 77)
        monkeypatch.setattr(plans, "index_of", lambda tensor: 3)
        monkeypatch.setattr(plans, "_raw_stream", None)
        monkeypatch.setattr(plans.Plan, "allocate", lambda plan, size, stream: lib.allocate(size, stream))
        monkeypatch.setattr(plans, "_free", lib.free)
        plans.PLANS.by_key.clear()
        return lib

    yield install
    plans.PLANS.by_key.clear()
