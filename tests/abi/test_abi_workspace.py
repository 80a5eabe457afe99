# SPDX-License-Identifier: Apache-2.0
"""The wgmma family's workspace is the 8-bit copies of K and V and hardly anything else."""

import itertools

import pytest

from tests.kit import abi

CAPABILITY = {"fake": 100, "real": 90}  # where each library has rows of the family
OVERHEAD = 1.01
SHAPES = [
    dict(zip(("heads_kv", "seqlen_k", "head_dim", "flags"), shape, strict=True))
    for shape in itertools.product((32, 8), (4096, 5000, 8192, 16384), (64, 128), (0, abi.CAUSAL | abi.LSE))
]


@pytest.mark.parametrize("build", CAPABILITY)
@pytest.mark.parametrize("precision", [abi.INT8_FP16, abi.INT8_FP8, abi.INT8_INT8])
def test_workspace_is_the_quantized_copies(request, stub, build, precision):
    library = request.getfixturevalue(f"{build}_library")
    code = f"""
result = []
for shape in {SHAPES!r}:
    shape |= dict(batch=4, heads_q=32, seqlen_q=shape["seqlen_k"], precision={precision})
    status, selected = lib.select(abi.request(**shape), abi.device({CAPABILITY[build]}))
    family = lib.rows()[selected.row].family.decode() if status == abi.OK else ""
    result.append([family, *lib.workspace_size(abi.attention_args(**shape))])
"""
    found = stub.run(library, code, STUB_CAPABILITY=CAPABILITY[build])
    cases = [(shape, *rest) for shape, (family, *rest) in zip(SHAPES, found, strict=True) if family == "wgmma"]
    if not cases:
        pytest.skip(f"the {build} library has no wgmma row of this precision")
    excess = []
    for shape, status, size in cases:
        assert status == abi.OK, shape
        copy = 4 * shape["heads_kv"] * -(-shape["seqlen_k"] // 128) * 128 * shape["head_dim"]
        copies = copy * (1 if precision == abi.INT8_FP16 else 2)
        if size > OVERHEAD * copies:
            excess.append(f"{shape}: {size} bytes, {100 * (size / copies - 1):.2f} % over the copies")
    assert not excess, "\n".join(excess)
