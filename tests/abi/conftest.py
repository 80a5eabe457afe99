# SPDX-License-Identifier: Apache-2.0
from tests.kit.fixtures import any_library, compiler, fake_library, lib, real_library, stub  # noqa: F401
