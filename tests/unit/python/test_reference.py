# SPDX-License-Identifier: Apache-2.0
"""The reference: accuracy classes, quantizers, and where NaN and infinity go."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from sagert import quantize, recipes, reference  # noqa: E402

LIMITS = {"int8_fp16": 0.0135, "int8_fp8": 0.039}
BYTES = [("portable", None), ("wgmma", None), ("mma", None), ("mma", recipes.WIDE_BLOCK)]  # blocks in which P is scaled


def make(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim"), [(1024, 64), (2048, 128)])
def test_accuracy_on_normal_inputs(precision, dtype, length, dim):
    q, k, v = (make(1, 1, length, dim, dtype=dtype, seed=seed) for seed in range(3))
    out, _ = reference.attention(q, k, v, precision=precision)
    exact, _ = reference.exact_attention(q, k, v)
    metrics = reference.error_metrics(out, exact)
    assert metrics["relative_l1"] <= LIMITS[precision]
    assert metrics["cosine"] > 0.999


def test_exact_attention_is_sdpa_in_float64():
    q, k, v = make(2, 4, 19, 32), make(2, 2, 31, 32, seed=1), make(2, 2, 31, 24, seed=2)
    for causal in (False, True):
        out, lse = reference.exact_attention(q, k, v, is_causal=causal)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True
        )
        torch.testing.assert_close(out, expected)
        assert torch.isfinite(lse).all()


@pytest.mark.parametrize("precision", LIMITS)
def test_block_size_changes_only_rounding(precision):
    q, k, v = (make(1, 2, 300, 64, seed=seed) for seed in range(3))
    wide, lse_wide = reference.attention(q, k, v, precision=precision, block_n=512)
    narrow, lse_narrow = reference.attention(q, k, v, precision=precision, block_n=64)
    assert reference.error_metrics(wide, narrow)["relative_l1"] < 0.02
    torch.testing.assert_close(lse_wide, lse_narrow, atol=1e-5, rtol=1e-5)


def test_chunks_do_not_change_the_result(monkeypatch):
    q, k, v = (make(2, 4, 70, 32, seed=seed) for seed in range(3))
    whole = reference.attention(q, k, v)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    parts = reference.attention(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_row_quantizer():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [127.0, 2.5, -3.5]])
    values, scale = quantize.quantize_rows(x, math.inf)
    assert values[0].tolist() == [64.0, -127.0, 32.0]
    assert values[1].tolist() == [0.0, 0.0, 0.0]
    assert scale[1].item() == 1.0
    assert values[2].tolist() == [127.0, 2.0, -4.0]  # half to even


def test_row_quantizer_of_nonfinite_rows():
    x = torch.tensor([[1.0, math.inf, -math.inf], [1.0, math.nan, math.inf]])
    values, scale = quantize.quantize_rows(x, math.inf)
    assert values.tolist() == [[0.0, 127.0, -127.0], [0.0, 0.0, 0.0]]
    assert scale[0].item() == math.inf
    assert scale[1].isnan()


def test_v_quantizer():
    v = torch.tensor([[[1.0, 0.0, math.inf], [-448.0, 0.0, 2.0]]])
    values, scale = quantize.quantize_v_fp8(v)
    assert scale.tolist() == [[[1.0, 1.0, pytest.approx(2 / 448)]]]
    assert values.tolist() == [[[1.0, 0.0, 0.0], [-448.0, 0.0, 448.0]]]


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("target", ["q", "k", "v"])
@pytest.mark.parametrize("values", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf), (1e4, math.inf)])
def test_nonfinite_inputs_land_where_exact_attention_puts_them(precision, causal, target, values):
    tensors = {name: make(1, 2, 160, 32, seed=seed) for seed, name in enumerate("qkv")}
    # A query entry that rounds to 0 meets an infinite key as 0 * inf: NaN. Keep these away from 0.
    tensors["q"][..., 7] += torch.sign(tensors["q"][..., 7])
    for index, value in enumerate(values):
        tensors[target][0, 1, 40 + 50 * index, 7] = value
    out, _ = reference.attention(**tensors, is_causal=causal, precision=precision)
    exact, _ = reference.exact_attention(**tensors, is_causal=causal)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out == math.inf, exact == math.inf)
    assert torch.equal(out == -math.inf, exact == -math.inf)


@pytest.mark.parametrize("precision", LIMITS)
def test_a_block_of_keys_at_minus_infinity_has_no_weight(precision):
    q, k, v = (make(1, 1, 256, 16, seed=seed) for seed in range(3))
    q = q.abs() + 0.5
    k[:, :, :128, 0] = -math.inf
    out, _ = reference.attention(q, k, v, precision=precision)
    exact, _ = reference.exact_attention(q, k, v)
    assert torch.isfinite(out).all()
    assert reference.error_metrics(out, exact)["relative_l1"] < 0.06


@pytest.mark.parametrize("precision", LIMITS)
def test_zero_inputs(precision):
    zero = torch.zeros(1, 1, 8, 16, dtype=torch.float16)
    out, lse = reference.attention(zero, zero, zero, precision=precision)
    assert torch.equal(out, zero)
    torch.testing.assert_close(lse, torch.full((1, 1, 8), math.log(8.0)))


def test_precision_without_reference():
    zero = torch.zeros(1, 1, 8, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match="nvfp4"):
        reference.attention(zero, zero, zero, precision="nvfp4")


@pytest.mark.parametrize("family", recipes.TILED)
@pytest.mark.parametrize("causal", [False, True])
def test_the_tiled_recipes_are_as_accurate(causal, family):
    q, k, v = (make(1, 2, 700, 64, seed=seed) for seed in range(3))
    v = v + torch.arange(64) % 2 * 3  # biased channels, whose mean comes off
    out, lse = reference.attention(q, k, v, is_causal=causal, precision="int8_fp8", family=family)
    exact, exact_lse = reference.exact_attention(q, k, v, is_causal=causal)
    plain, _ = reference.attention(q, k, v, is_causal=causal, precision="int8_fp8")
    error = reference.error_metrics(out, exact)["relative_l1"]
    assert error < reference.error_metrics(plain, exact)["relative_l1"]
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim"), [(1024, 64), (2048, 128)])
@pytest.mark.parametrize(("family", "block"), BYTES)
def test_accuracy_of_integer_pv_on_normal_inputs(dtype, length, dim, family, block):
    q, k, v = (make(1, 1, length, dim, dtype=dtype, seed=seed) for seed in range(3))
    out, lse = reference.attention(q, k, v, precision="int8_int8", family=family, block_n=block)
    exact, exact_lse = reference.exact_attention(q, k, v)
    assert reference.error_metrics(out, exact)["relative_l1"] <= 0.0158
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.02, rtol=0)


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1100, 4096, 16384, 131072, 1 << 23])
def test_a_sample_is_spread_over_the_keys(length):
    keys = quantize.sampled_keys(length)
    assert len(keys) == length if length < 1024 else 512 <= len(keys) < 1024
    assert (keys.diff() > 0).all()
    assert not len(keys) or (keys[0] >= 0 and keys[-1] < length)


@pytest.mark.parametrize("period", [2, 3, 7, 8, 12, 16, 26, 32, 45, 60, 64, 80])
@pytest.mark.parametrize("length", [2048, 4096, 17776, 32760])
def test_a_sample_sees_all_of_a_period(length, period):
    """Tokens of an image or a video have its width for a period: a sample's mean of what has one is near the mean."""
    counts = torch.bincount(quantize.sampled_keys(length) % period, minlength=period)
    assert float((counts * (period / counts.sum()) - 1).square().mean()) <= (0.07**2) * period


@pytest.mark.parametrize("family", ["portable", *recipes.TILED])
def test_the_shift_is_the_mean(family):
    """Of all keys, or in the tiled families of a sample of them."""
    k, v = (make(2, 3000, 64, seed=seed) for seed in (1, 2))
    kv = recipes.quantize_heads(k + 5, v, recipes.recipe_of("int8_fp8", family=family))
    keys = quantize.sampled_keys(3000) if family in recipes.TILED else slice(None)
    torch.testing.assert_close(kv.k_shift, (k + 5).float()[:, keys].mean(1, keepdim=True))


@pytest.mark.parametrize(("family", "block"), [pair for pair in BYTES if pair[0] != "portable"])
@pytest.mark.parametrize("causal", [False, True])
def test_integer_pv_is_its_definition(causal, family, block):
    """A weighted mean of the dequantized V, weights being bytes times the exponential of their block's row maximum."""
    q, k, v = (make(1, 1, 300, 64, seed=seed) for seed in (3, 4, 5))  # no byte is near a tie
    v = v + torch.arange(64) % 2 * 3
    out, lse = reference.attention(
        q, k, v, is_causal=causal, precision="int8_int8", family=family, block_n=block, smooth_k=False, scale=0.5
    )
    size = block or recipes.BLOCKS[family]
    q8, q_scale = quantize.quantize_rows(q[0, 0].float(), math.nan)
    q_scale = q_scale * torch.tensor(0.5 * recipes.LOG2E)
    k8, k_scale = quantize.quantize_key_groups(k[0].float(), size)
    scores = (q8.double() @ k8[0].double().T) * q_scale.double() * k_scale[0].double().T
    if causal:
        scores = scores.masked_fill(torch.ones(300, 300).triu(1) > 0, -math.inf)
    mean = quantize.v_mean(v[0].float())
    assert ((mean != 0).flatten() == torch.arange(64) % 2).all()
    less_mean, unit = v[0].float() - mean, torch.ones(1, 1, 64)
    if family == "wgmma":  # channels share scales
        unit = quantize.v_units(less_mean)
        v8, v_scale = quantize.quantize_v_int8_groups(less_mean / unit, size)
    else:
        v8, v_scale = quantize.quantize_v_int8(less_mean, size)
    numerator, denominator = torch.zeros(300, 64).double(), torch.zeros(300, 1).double()
    whole = torch.exp2(scores).sum(1)  # of the weights before they are bytes
    if family == "wgmma":  # the leading keys' are none
        leading = torch.exp2(scores[:, : recipes.LEADING_KEYS])
        numerator += 255 * leading @ (less_mean / unit)[0, : recipes.LEADING_KEYS].half().double()
        denominator += 255 * leading.sum(1, keepdim=True)
        scores[:, : recipes.LEADING_KEYS] = -math.inf
    for block in range(-(-300 // size)):
        keys = slice(size * block, size * block + size)
        highest = scores[:, keys].amax(1, keepdim=True)
        p = torch.round(255 * torch.exp2(scores[:, keys] - highest.clamp(min=-1e30)))
        weight = torch.exp2(highest)
        numerator += weight * (p @ v8[0, keys].double()) * v_scale[0, block].double()
        denominator += weight * p.sum(1, keepdim=True)
    expected = numerator / denominator * unit[0] + mean[0].double()
    assert reference.error_metrics(out[0, 0], expected)["relative_l1"] < 0.001
    expected_lse = torch.log(denominator[:, 0] / 255 if family == "mma" else whole)
    torch.testing.assert_close(lse[0, 0].double(), expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["portable", "wgmma"])
def test_integer_pv_of_nonfinite_v(family):
    q, k, v = (make(1, 2, 200, 32, seed=seed) for seed in range(3))
    v[0, 0, 150, 3], v[0, 1, 20, 5] = math.nan, math.inf
    out, _ = reference.attention(q, k, v, is_causal=True, precision="int8_int8", family=family)
    exact, _ = reference.exact_attention(q, k, v, is_causal=True)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out == math.inf, exact == math.inf)


def test_v_blocks():
    v = make(1, 200, 16, dtype=torch.float32)
    v[0, 128:, 3] = 0.0
    v[0, 7, 2] = math.inf
    values, scale = quantize.quantize_v_int8(v)
    assert values.shape == v.shape
    assert scale.shape == (1, 2, 16)
    assert torch.equal(scale, scale.bfloat16().float())
    assert scale[0, 1, 3] == 1
    assert values[0, 7, 2] == 0
    assert values.abs().max() <= 127
    used = scale.repeat_interleave(128, 1)[:, :200]
    error = (values * used - torch.where(v.isfinite(), v, 0.0)).abs()
    assert (error <= used / 2 * 1.001).all()


@pytest.mark.parametrize("channels", [61, 64])
def test_groups_of_channels_share_scales_of_v(channels):
    """The loudest of 16 channels sets their scale, but where it is far louder than others: then each of two."""
    v = make(1, 384, channels, dtype=torch.float32)
    v[0, 200, 3] = 30.0
    v[0, 256:, :16] = 0.0
    v[0, 256:, 20:24] = 0.0
    v[0, 7, 2] = math.inf
    values, scale = quantize.quantize_v_int8_groups(v)
    own_values, own = quantize.quantize_v_int8(v)
    assert values.shape == v.shape
    assert torch.equal(scale, scale.bfloat16().float())
    own = torch.nn.functional.pad(own, (0, 64 - channels))
    by_group, by_pair = (own.reshape(1, 3, -1, n).amax(-1).repeat_interleave(n, 2)[..., :channels] for n in (16, 2))
    assert torch.equal(scale[0, 0], by_group[0, 0])
    assert torch.equal(scale[0, 1], by_pair[0, 1])
    assert (scale[0, 2, :16] == 1.0).all()
    assert torch.equal(scale[0, 2, 32:], by_group[0, 2, 32:])
    assert torch.equal(values[0, 128:256, 3], own_values[0, 128:256, 3])
    assert values[0, 7, 2] == 0
    used = scale.repeat_interleave(128, 1)
    assert ((values * used - torch.where(v.isfinite(), v, 0.0)).abs() <= used / 2 * 1.001).all()


def test_limit_of_groups_is_the_kernels():
    folder = Path(__file__).parents[3] / "kernels/sm90"
    assert (
        float(re.search(r"kEvenSpread = ([\d.]+)f;", (folder / "prepass.cu").read_text())[1]) == quantize.GROUP_SPREAD
    )
    assert int(re.search(r"kVGroups = (\d+);", (folder / "leading.cuh").read_text())[1]) == quantize.V_GROUPS


def test_units_of_v_are_root_mean_squares():
    v = make(2, 100, 3, dtype=torch.float32)
    v[0, :, 1] = 0.0
    v[1, 4, 2] = math.nan
    unit = quantize.v_units(v)
    torch.testing.assert_close(unit[0, 0, 0], v[0, :, 0].square().mean().sqrt())
    assert unit[0, 0, 1] == torch.tensor(1e-10)
    assert unit.isfinite().all()


def test_int8_codes_of_v():
    v = make(1, 200, 16, dtype=torch.float32)
    v[0, 7, 2], v[0, 8, 2], v[0, 9, 2] = math.inf, -math.inf, math.nan
    values, scale = quantize.quantize_v_int8(v, 64, quantize.V_MAX, False)
    assert scale.shape == (1, 4, 16)
    assert values.abs().max() == 126
    decoded, positive, negative = quantize.decode_v_int8(quantize.encode_v_int8(values, v))
    assert torch.equal(decoded, values)
    assert torch.equal(positive, (v == math.inf) | v.isnan())
    assert torch.equal(negative, (v == -math.inf) | v.isnan())


def test_a_family_without_reference_is_refused():
    q = make(1, 1, 8, 64)
    for family, precision in (("wgmma", "nvfp4"), ("portable", "int4_fp8"), ("tcgen05", "int8_fp8")):
        with pytest.raises(ValueError, match="portable"):
            reference.attention(q, q, q, precision=precision, family=family)


def test_leading_keys_are_the_kernels_and_the_hosts():
    root = Path(__file__).parents[3]
    for path, pattern in (
        ("kernels/sm90/leading.cuh", r"V::kInt8 \? (\d+) : 0"),
        ("host/families/wgmma.cc", r"kLeadingKeys = (\d+)"),
    ):
        assert int(re.search(pattern, (root / path).read_text())[1]) == recipes.LEADING_KEYS, path


def test_key_groups():
    k = make(1, 200, 16, dtype=torch.float32)
    values, scale = quantize.quantize_key_groups(k)
    assert values.shape == k.shape
    assert scale.shape == (1, 200, 1)
    group = torch.arange(200) // 128 * 4 + torch.arange(200) % 8 // 2
    for g in group.unique():
        mine = group == g
        assert (scale[0, mine] == scale[0, mine][0]).all()
        assert values[0, mine].abs().max() == 127
    assert ((values * scale - k).abs() <= scale / 2 * 1.001).all()
