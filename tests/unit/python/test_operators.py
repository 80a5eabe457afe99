# SPDX-License-Identifier: Apache-2.0
"""The torch operators: schemas, fakes, torch.compile, and the struct the CUDA path hands to the library."""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert import errors, native, ops  # noqa: E402


def make(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 17, 32), make(2, 2, 29, 32, seed=1), make(2, 2, 29, 32, seed=2)


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse):
    for q in (Q, Q.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(ops.attention, (q, K, V, 0.2, True, 1, True, return_lse))
        torch.library.opcheck(ops.attention_out, (q, K, V, torch.empty_like(q), 0.2, True, 1, True, return_lse))


@pytest.mark.parametrize("layout", ["contiguous", "heads_inside", "packed", "one_head", "one_query"])
def test_fake_has_the_real_strides(layout):
    q = {
        "contiguous": Q,
        "heads_inside": Q.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": torch.cat([Q, Q], -1)[..., :32],
        "one_head": Q[:, :1],
        "one_query": Q[:, :, :1],
    }[layout]
    k, v = (K[:, :1], V[:, :1])
    out, lse = ops.attention(q, k, v, 1.0, False, 1, True, True)
    fake, fake_lse = ops.attention(q.to("meta"), k.to("meta"), v.to("meta"), 1.0, False, 1, True, True)
    assert fake.shape == out.shape
    assert lse.shape == fake_lse.shape
    meta_q = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device="meta")
    assert ops.attention(meta_q, k.to("meta"), v.to("meta"), 1.0, False, 1, True, True)[0].stride() == out.stride()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    torch._dynamo.reset()

    def model(q, k, v):
        out, lse = sagert.attention(q * 2, k, v, is_causal=True, enable_gqa=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (17, 23, 40):
        q, k, v = make(2, 4, length, 32), make(2, 2, length, 32, seed=1), make(2, 2, length, 32, seed=2)
        for got, expected in zip(compiled(q, k, v), model(q, k, v), strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()


def test_compile_with_out_and_layout():
    torch._dynamo.reset()

    def model(q, k, v, out):
        sagert.attention(q, k, v, out=out, layout="BSHD", precision="int8_fp8")
        return out * 2

    q = make(2, 17, 4, 32)
    out = torch.zeros_like(q)
    result = torch.compile(model, fullgraph=True, backend="aot_eager")(q, q, q, out)
    expected = sagert.attention(q, q, q, layout="BSHD", precision="int8_fp8")
    assert torch.equal(out, expected)
    assert torch.equal(result, expected * 2)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return sagert.attention(q, k, v, enable_gqa=True)

    program = torch.export.export(Model(), (Q, K, V))
    assert torch.equal(program.module()(Q, K, V), sagert.attention(Q, K, V, enable_gqa=True))
    assert any("sagert.attention" in str(node.target) for node in program.graph.nodes)


class Recorder:
    """Stands in for the library: records the struct, answers as told."""

    def __init__(self, size_status=0, status=0, size=4096):
        self.size_status, self.status, self.size = size_status, status, size
        self.seen = []

    def sagert_workspace_size(self, address, result):
        self.seen.append(("size", native.ARGS.unpack(ctypes.string_at(address, native.ARGS.size))))
        ctypes.c_uint64.from_address(result).value = self.size
        return self.size_status

    def sagert_attention(self, address):
        self.seen.append(("run", native.ARGS.unpack(ctypes.string_at(address, native.ARGS.size))))
        return self.status

    def sagert_last_error(self):
        return b"every row said no"


@pytest.fixture
def recorder(monkeypatch):
    empty = torch.empty

    def install(**answers):
        lib = Recorder(**answers)
        monkeypatch.setattr(native, "_lib", lib)
        monkeypatch.setattr(ops, "_stream", lambda index: 77)
        monkeypatch.setattr(ops.torch, "empty", lambda *sizes, device=None, **options: empty(*sizes, **options))
        return lib

    return install


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on cuda:3."""

    @property
    def device(self):
        return type("Device", (), {"index": 3, "type": "cuda"})()


def run(q, k, v, **options):
    q = q.as_subclass(OnDevice)
    out, lse = torch.empty_like(Q), torch.empty(2, 4, 17)
    arguments = {
        "scale": 0.25,
        "is_causal": True,
        "precision": 2,
        "smooth_k": False,
        "return_lse": True,
        "fallback_sdpa": False,
    }
    ops._run_cuda(q, k, v, out, lse, **{**arguments, **options})
    return out, lse


def test_cuda_path_packs_the_arguments(recorder):
    lib = recorder()
    out, lse = run(Q, K, V)
    (first, before), (second, after) = lib.seen
    assert (first, second) == ("size", "run")
    assert before[0] == native.ARGS_SIZE == 280 + 112
    assert before[1:8] == (2, 4, 2, 17, 29, 32, 32)
    assert before[8:13] == (Q.data_ptr(), *Q.stride())
    assert before[13:18] == (K.data_ptr(), *K.stride())
    assert before[18:23] == (V.data_ptr(), *V.stride())
    assert before[23:28] == (out.data_ptr(), *out.stride())
    assert before[28] == lse.data_ptr()
    assert before[29:31] == (0, 0)
    assert before[31:] == (77, 0.25, 2, 2, 1 | 2 | 32, 3)
    assert after[29] != 0
    assert after[30] == 4096
    assert after[:29] == before[:29]
    assert after[31:] == before[31:]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (1, errors.InvalidArgumentError),
        (2, errors.UnsupportedError),
        (3, errors.NoDriverError),
        (4, errors.IntegrityError),
        (5, errors.CudaError),
        (6, torch.OutOfMemoryError),
        (7, errors.InternalError),
        (99, errors.InternalError),
    ],
)
def test_statuses_become_exceptions(recorder, status, kind):
    recorder(size_status=status)
    with pytest.raises(kind, match="every row said no"):
        run(Q, K, V)
    recorder(status=status)
    with pytest.raises(kind):
        run(Q, K, V, fallback_sdpa=True)


@pytest.mark.parametrize("status", [1, 3, 4, 5, 6, 7])
def test_only_a_refusal_falls_back(recorder, status):
    recorder(size_status=status)
    with pytest.raises(Exception, match="every row said no"):
        run(Q, K, V, fallback_sdpa=True, return_lse=False)


def test_grad_flag_reaches_the_library(recorder):
    lib = recorder()
    run(Q, K.clone().requires_grad_(), V)
    assert lib.seen[0][1][-2] & 16


def test_struct_matches_the_mirror():
    assert native.WORKSPACE_OFFSET == 8 + 7 * 8 + 4 * 40 + 8
    assert ctypes.sizeof(native.Request) == 104
    assert ctypes.sizeof(native.DeviceStruct) == 8 + 6 * 4 + 8 + 128 + 16
    assert native.Request().struct_size == 104
