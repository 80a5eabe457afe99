# SPDX-License-Identifier: Apache-2.0
"""The library's own cost of a call, and that a repeated call is not selected again or served what another asked for."""

import sys

from tests.kit import abi, fake_build

sys.path.append(str(fake_build.ROOT / "benchmarks"))


def test_the_benchmark_of_the_library_runs(fake_library):
    import native_cost

    costs = native_cost.measure(fake_library, 100, "int8_fp16", 128)
    assert set(costs) == {"workspace_size", "attention", "both", "kv_plan", "quantize_kv"}
    for least, median in costs.values():
        assert 0.0 < least <= median
        assert least < 10_000  # nanoseconds; a tenth of it is usual


def test_recent_selections_are_told_apart(fake_library, stub):
    """Two hundred requests, more than a thread keeps, three times over: always what the registry answers afresh."""
    code = """
import itertools, threading
options = itertools.product(range(2), (0, 1, 2), (FP16, BF16), (64, 128), (0, CAUSAL, LSE), (1, 1000), (1, 2))
cases = [
    dict(zip(("device", "precision", "dtype", "head_dim", "flags", "seqlen_q", "batch"), option)) for option in options
]
def sizes():
    return [list(lib.workspace_size(abi.attention_args(**case))) for case in cases]
mine = sizes() + sizes()
other = []
thread = threading.Thread(target=lambda: other.extend(sizes()))
thread.start()
thread.join()
result = [len(cases), mine[: len(cases)] == mine[len(cases) :] == other, mine[: len(cases)]]
fresh = []
for case in cases:
    one = []
    thread = threading.Thread(target=lambda: one.append(list(lib.workspace_size(abi.attention_args(**case)))))
    thread.start()
    thread.join()
    fresh += one
result.append(fresh)
"""
    count, same, kept, fresh = stub.run(fake_library, code, STUB_CAPABILITY="89,100")
    assert count >= 200
    assert same
    assert kept == fresh
    assert len({size for _, size in kept}) > 20


def test_refusals_are_not_kept(fake_library, stub):
    code = """
result = []
for _ in range(3):
    result.append([lib.attention(abi.attention_args(head_dim=200)), "head_dim up to 128" in lib.error()])
    result.append([lib.attention(abi.attention_args(flags=1 << 20)), "does not know" in lib.error()])
"""
    refused = [[abi.UNSUPPORTED, True], [abi.INVALID_ARGUMENT, True]]
    assert stub.run(fake_library, code) == refused * 3
