# SPDX-License-Identifier: Apache-2.0
"""The general kernels, executed by Triton's interpreter, against float64 attention."""

import math

import general_harness as harness
import pytest
import torch

PRECISIONS = ("int8_fp16", "int8_fp8", "int8_int8")
BARS = {"int8_fp16": 0.018, "int8_fp8": 0.05, "int8_int8": 0.022}
INF = math.inf


def make(b, h, hk, s, sk, d, dv=None, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, s, d), (b, hk, sk, d), (b, hk, sk, dv or d))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k + 1, v


def check(q, k, v, precision, oracle=None, **features):
    """Runs the kernels and compares with float64; returns (out, lse)."""
    out, lse = harness.run(q, k, v, precision=precision, **features)
    for name in ("tiles", "chunk", "carrier"):
        features.pop(name, None)
    exact, exact_lse = harness.exact(q, k, v, **(features if oracle is None else oracle))
    compare(out, lse, exact, exact_lse, precision)
    return out, lse


def compare(out, lse, exact, exact_lse, precision):
    finite = exact.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[~finite].sign().nan_to_num(2), exact[~finite].sign().to(out.dtype).nan_to_num(2))
    error = (out.double() - exact)[finite].abs().sum()
    assert float(error) <= BARS[precision] * float(exact[finite].abs().sum())
    assert torch.equal(lse == -INF, exact_lse == -INF)
    assert not out[lse == -INF].any()
    seen = exact_lse.isfinite()
    assert float((lse - exact_lse)[seen].abs().max() if seen.any() else 0) < 0.08


PLACES = [
    {},
    {"causal": True},
    {"causal": True, "bottom_right": True},
    {"window": (20, 5)},
    {"window": (0, 0)},
    {"window": (-1, 70)},
    {"window": (64, -1), "bottom_right": True},
    {"window": (40, 3), "causal": True, "bottom_right": True},
]
LENGTHS = [(130, 200), (130, 60), (1, 200), (64, 64), (200, 1)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_places(lengths, place, precision):
    check(*make(1, 2, 1, *lengths, 64), precision, **place)


MASKS = ["bool", "fp16", "bf16", "fp32"]


def make_mask(kind, shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    if kind == "bool":
        return torch.rand(shape, generator=generator) > 0.5
    mask = torch.randn(shape, generator=generator) * 2
    mask[torch.rand(shape, generator=generator) < 0.3] = -INF
    return mask.to({"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kind])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2], PLACES[3]], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, place, precision):
    mask = make_mask(kind, (2, 1, 130, 200))
    mask[0, 0, 5] = False if kind == "bool" else -INF  # a query that sees nothing
    mask[1, 0, 64:130] = False if kind == "bool" else -INF  # a tile that sees nothing
    check(*make(2, 2, 1, 130, 200, 64), precision, mask=mask, **place)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_aligned_masks(kind, dtype, precision):
    mask = make_mask(kind, (2, 2, 128, 192))
    mask[:, :, :64, 64:128] = True if kind == "bool" else 0  # a clean block
    mask[:, :, 64:, :64] = False if kind == "bool" else -INF  # one that is left out
    check(*make(2, 2, 1, 128, 192, 64, dtype=dtype), precision, mask=mask)


SHAPES = [(1, 1, 1, 200), (2, 1, 1, 200), (1, 2, 130, 1), (130, 200), (2, 2, 130, 200), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "fp32"])
def test_broadcast_masks(kind, shape):
    mask = make_mask(kind, shape)
    mask[..., :1] = True if kind == "bool" else 0.5
    check(*make(2, 2, 1, 130, 200, 64), "int8_fp16", mask=mask)


def test_strides_of_masks_do_not_change_the_result():
    q, k, v = make(2, 2, 1, 70, 96, 64)
    mask = make_mask("fp32", (2, 2, 70, 96))
    expected, expected_lse = check(q, k, v, "int8_fp16", mask=mask)
    for view in (
        mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.nn.functional.pad(mask, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
        torch.stack([mask, torch.full_like(mask, math.nan)], -1)[..., 0],
    ):
        out, lse = harness.run(q, k, v, precision="int8_fp16", mask=view)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lists_equal_ranges(precision):
    """A mask that hides nothing gives the bits of no mask."""
    q, k, v = make(1, 2, 1, 130, 300, 64)
    for place in PLACES:
        expected, expected_lse = harness.run(q, k, v, precision=precision, **place)
        mask = torch.ones(130, 300, dtype=torch.bool)
        out, lse = harness.run(q, k, v, precision=precision, mask=mask, **place)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lowest_finite_mask_is_no_mask_of_infinities(dtype, precision):
    """A row of lowest values weighs every key alike, as exact attention does; scores vanish beside them."""
    mask = torch.zeros(70, 130, dtype=dtype)
    mask[3] = torch.finfo(dtype).min
    mask[4, 5:] = torch.finfo(dtype).min
    q, k, v = make(1, 1, 1, 70, 130, 64)
    out, _ = harness.run(q, k, v, precision=precision, mask=mask)
    exact, _ = harness.exact(q, k, v, mask=mask)
    if dtype != torch.float16:
        torch.testing.assert_close(out[0, 0, 3].float(), v[0, 0].float().mean(0), rtol=0, atol=0.02)
    assert float((out - exact).abs().max()) < 0.2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_in_a_mask(precision):
    mask = torch.zeros(70, 130)
    mask[7, 100] = math.nan
    out, lse = harness.run(*make(1, 2, 1, 70, 130, 64), precision=precision, mask=mask)
    rows = torch.arange(70) == 7
    assert out[:, :, rows].isnan().all()
    assert lse[:, :, rows].isnan().all()
    assert out[:, :, ~rows].isfinite().all()


HEAD_DIMS = [(1, 1), (40, 72), (72, 40), (64, 128), (128, 64), (129, 129), (192, 128), (200, 256), (96, 200)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dims, precision):
    check(*make(1, 2, 1, 40, 100, *dims), precision, causal=True, tiles=(64, 64 if precision == "int8_int8" else 32))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiles", [(64, 64), (128, 32), (128, 64), (64, 128), (128, 128)], ids=str)
def test_tiles(tiles, precision):
    if precision == "int8_int8" and tiles[1] != 64:
        pytest.skip("V's scales are those of blocks of 64 keys")
    q, k, v = make(1, 1, 1, 150, 300, 64)
    check(q, k, v, precision, tiles=tiles, window=(100, 30))
    check(q, k, v, precision, tiles=tiles, mask=make_mask("bool", (150, 300)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp16_carries_int8_exactly(precision):
    q, k, v = make(1, 2, 1, 70, 150, 128, dtype=torch.bfloat16)
    features = {"precision": precision, "mask": make_mask("fp32", (70, 150)), "window": (60, 20)}
    out, lse = harness.run(q, k, v, **features)
    carried, carried_lse = harness.run(q, k, v, carrier=torch.float16, **features)
    assert torch.equal(out, carried)
    assert torch.equal(lse, carried_lse)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_keys(precision):
    out, lse = check(*make(1, 2, 1, 5, 0, 64), precision)
    assert not out.any()
    assert bool((lse == -INF).all())


SEGMENTS = [
    ([0, 70, 70, 200], [0, 130, 140, 140]),  # one without queries, one without keys
    ([0, 1, 2, 3], [0, 128, 256, 300]),
    ([0, 65, 130], [0, 3, 5]),
    ([0, 0], [0, 0]),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2], PLACES[7]], ids=str)
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_packed_sequences_are_sequences_alone(segments, place, precision):
    cu_q, cu_k = (torch.tensor(x) for x in segments)
    q, k, v = make(1, 4, 2, int(cu_q[-1]), int(cu_k[-1]), 64)
    longest = [int(cu.diff().max()) for cu in (cu_q, cu_k)]
    out, lse = harness.run(
        q, k, v, precision=precision, cu_q=cu_q, cu_k=cu_k, max_q=longest[0], max_k=longest[1], **place
    )
    for i in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        if queries.start == queries.stop:
            continue
        own = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        compare(out[:, :, queries], lse[:, :, queries], *harness.exact(*own, **place), precision)
        # The mean of K is one of the segment's own.
        alone, alone_lse = harness.run(*own, precision=precision, **place)
        if keys.stop - keys.start <= 128:
            torch.testing.assert_close(out[:, :, queries], alone, rtol=0, atol=2e-3)
            torch.testing.assert_close(lse[:, :, queries], alone_lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [INF, -INF, math.nan], ids=str)
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"causal": True},
        {"window": (10, 3)},
        {"window": (10, 3), "bottom_right": True},
        {"mask": make_mask("bool", (70, 100))},
        {"mask": make_mask("fp32", (70, 100)), "causal": True},
        {"mask": make_mask("fp16", (2, 70, 100))},
    ],
    ids=["full", "causal", "window", "bottom right", "bool", "fp32 causal", "fp16"],
)
def test_non_finite_values_reach_exactly_the_queries_that_see_them(features, value, precision):
    q, k, v = make(1, 2, 2, 70, 100, 64)
    v[0, 0, 40, 7] = value
    v[0, 0, 60, 7] = INF
    v[0, 0, 99, 63] = -INF
    check(q, k, v, precision, **features)


@pytest.mark.parametrize("value", [INF, -INF, math.nan], ids=str)
@pytest.mark.parametrize("features", [{"causal": True}, {"mask": make_mask("bool", (70, 100))}], ids=["causal", "bool"])
def test_non_finite_values_where_fp16_carries_the_integers(features, value):
    q, k, v = make(1, 2, 2, 70, 100, 64)
    v[0, 0, 40, 7] = value
    v[0, 0, 99, 63] = -INF
    check(q, k, v, "int8_int8", carrier=torch.float16, **features)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [INF, math.nan], ids=str)
def test_non_finite_keys_do_not_reach_queries_that_do_not_see_them(value, precision):
    q, k, v = make(1, 2, 2, 70, 100, 64)
    q[..., 7] += torch.where(q[..., 7] < 0, -0.5, 0.5)
    k[0, 0, 40, 7] = value
    for features in ({"causal": True}, {"window": (10, 3)}, {"mask": make_mask("fp32", (70, 100))}):
        out, _ = harness.run(q, k, v, precision=precision, **features)
        sees = harness.visible(70, 100, **features)[:, 40]
        assert out[0, 0][~sees].isfinite().all()
        assert out[0, 1].isfinite().all()
        assert not (out[0, 0][sees].isfinite().all() and math.isnan(value))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_infinite_scores_are_no_empty_row(precision):
    """A query whose every visible score is -inf has no softmax, one that sees nothing is 0."""
    q, k, v = make(1, 1, 1, 64, 64, 64)
    q[..., 7] = -1.0
    k[0, 0, 10, 7] = INF
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[:, 10] = torch.arange(64) >= 2
    mask[2, :] = torch.arange(64) == 10
    mask[1] = False
    out, lse = harness.run(q, k, v, precision=precision, mask=mask)
    assert out[0, 0, 2].isnan().all()
    assert not out[0, 0, 1].any()
    assert lse[0, 0, 1] == -INF
    assert out[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scale_and_smoothing(precision):
    q, k, v = make(1, 1, 1, 40, 90, 64, dtype=torch.bfloat16)
    mask = make_mask("bf16", (40, 90))
    for scale in (0.3, -0.2, 0.0):
        out, lse = harness.run(q, k, v, precision=precision, scale=scale, mask=mask)
        exact, exact_lse = harness.exact(q, k, v, scale=scale, mask=mask)
        assert float((out - exact).abs().sum() / exact.abs().sum()) < 0.06
        assert float((lse - exact_lse).abs().max()) < 0.2
    check(q, k, v, precision, mask=mask, smooth_k=False, oracle={"mask": mask})
