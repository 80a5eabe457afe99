# SPDX-License-Identifier: Apache-2.0
"""What the reference has of the mma family alone: Q and K in INT4, sums in fp16, and even blocks of V."""

import math
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from sagert import quantize, recipes, reference  # noqa: E402


def make(*shape, seed=0, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(q, k, v, precision, **options):
    return reference.attention(q, k, v, precision=precision, family="mma", **options)


def relative_l1(out, expected):
    return reference.error_metrics(out, expected)["relative_l1"]


@pytest.mark.parametrize("precision", recipes.INT4_PRECISIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
def test_int4_is_as_accurate_as_its_rows_say(precision, causal, dim, dtype):
    q, k, v = (make(1, 2, 600, dim, seed=seed, dtype=dtype) for seed in range(3))
    out, lse = attend(q, k[:, :1], v[:, :1], precision, is_causal=causal)
    exact, exact_lse = reference.exact_attention(q, k[:, :1], v[:, :1], is_causal=causal)
    assert relative_l1(out, exact) <= 0.2
    assert (lse.double() - exact_lse).abs().max() <= 1.2


def test_int4_is_its_definition():
    """Scores of rounded queries less their means, and what the means give with K."""
    q, k, v = (make(1, 1, 300, 64, seed=seed) for seed in range(3))
    q, k = q + 2, k + 1
    out, lse = attend(q, k, v, "int4_fp16", scale=-0.25)
    means = torch.cat(
        [q[0, 0, first : first + 128].float().mean(0, keepdim=True).expand(128, 64) for first in (0, 128, 256)]
    )[:300]
    means = means.half().float()
    x = q[0, 0].float() - means
    step = x.abs().amax(1, keepdim=True) / 7
    rows = torch.round(x / step)
    assert rows.abs().max() == 7
    shift = k[0, 0].float().mean(0)
    k4, k_scale = quantize.quantize_key_groups((k[0].float() - shift), 64, 7.0)
    assert k4.abs().max() == 7
    scores = (rows.double() @ k4[0].double().T) * step.double() * k_scale[0].double().T
    scores = -0.25 * (scores + means.double() @ (k[0, 0].double() - shift.double()).T)
    torch.testing.assert_close(out[0, 0].double(), torch.softmax(scores, 1) @ v[0, 0].double(), atol=2e-3, rtol=1e-3)
    given_back = -0.25 * (q[0, 0].double() @ shift.double())
    torch.testing.assert_close(lse[0, 0].double(), torch.logsumexp(scores, 1) + given_back, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "dim", "block"), [(100, 64, 128), (4096, 64, 128), (4097, 64, 256), (8192, 96, 128), (16385, 128, 512)]
)
def test_blocks_of_means(length, dim, block):
    """Their products with K take no more memory than K in 16 bits."""
    q = make(1, length, dim)
    means = quantize.q_means(q)
    assert means.shape == q.shape
    starts = range(0, length, block)
    for first in starts:
        expected = q[0, first : first + block].float().mean(0).half().float()
        assert torch.allclose(means[0, first : first + block], expected, atol=2e-3)
    assert len(means[0].unique(dim=0)) == len(starts) <= {64: 32}.get(dim, 64)


def test_means_of_channels_cost_int4_nothing():
    q, k, v = (make(1, 1, 400, 128, seed=seed) for seed in range(3))
    bias = 3 * make(128, seed=9)
    plain = relative_l1(attend(q, k, v, "int4_fp16")[0], reference.exact_attention(q, k, v)[0])
    moved = relative_l1(attend(q + bias, k, v, "int4_fp16")[0], reference.exact_attention(q + bias, k, v)[0])
    assert moved <= 1.1 * plain


def test_a_mean_leaves_out_what_is_not_finite():
    q = make(2, 3, 140, 32)
    q[0, 0, 5, 3], q[1, 2, 139, 7] = math.nan, -math.inf
    assert torch.equal(quantize.q_means(q), quantize.q_means(torch.where(q.isfinite(), q, 0.0)))
    out, _ = attend(q[None, 0], *(make(1, 3, 70, 32, seed=seed) for seed in (1, 2)), "int4_int8")
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[0, 0, 5]]))


@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8", "int4_fp16", "int4_fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_in_fp16_cost_little(precision, dtype):
    q, k, v = (make(1, 2, 700, 64, seed=seed, dtype=dtype) for seed in range(3))
    v = v + torch.arange(64) % 2 * 3
    whole, lse = attend(q, k, v, precision)
    halves, half_lse = attend(q, k, v, precision, half_sums=True)
    exact, _ = reference.exact_attention(q, k, v)
    assert relative_l1(halves, exact) <= 1.1 * relative_l1(whole, exact)
    assert not torch.equal(halves, whole)
    torch.testing.assert_close(half_lse, lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8"])
def test_sums_in_fp16_stay_finite(precision):
    """Whatever V is: 64 equal weights at their largest, and V at its largest."""
    q, k = torch.zeros(1, 1, 4, 64).half(), torch.zeros(1, 1, 200, 64).half()
    v = torch.tensor([-60000.0, 60000.0, 1e-4, 0.0]).half().expand(1, 1, 200, 4) * torch.tensor([1, 0.5])[
        torch.arange(200) // 100, None
    ].to(torch.float16)
    out, _ = attend(q, k, v, precision, half_sums=True)
    torch.testing.assert_close(out[0, 0, 0], v.float().mean(2)[0, 0].half(), rtol=0.01, atol=1e-6)


def test_v_in_scaled_fp16():
    v = make(1, 200, 16, dtype=torch.bfloat16).float()
    v[0, :, 3], v[0, :, 4] = 0.0, 2.0
    v[0, 7, 2] = math.inf
    values, scale = quantize.quantize_v_half(v)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), "not powers of two"
    assert values[0, 7, 2] == 0
    assert scale[0, 0, 4] == 2
    assert values.abs().max() <= 1
    clean = torch.where(v.isfinite(), v, 0.0)
    assert torch.equal(values * scale, clean), "a power of two loses no bit"
    assert (values.abs().amax(1) > 0.5).logical_or(clean.abs().amax(1) == 0).all()


def test_what_has_no_fp16_sums():
    q = make(1, 1, 8, 64)
    for precision, family in (("int8_int8", "mma"), ("int8_fp16", "wgmma"), ("int8_fp8", "portable")):
        with pytest.raises(ValueError, match="half_sums"):
            reference.attention(q, q, q, precision=precision, family=family, half_sums=True)


def test_even_blocks_of_v():
    """One factor for all channels, in units of the head, but where a channel is far louder, or beside a sink."""
    v = make(3, 300, 128, seed=5).float() * torch.linspace(0.01, 30.0, 128)
    v[1, 130, 7] *= 100.0
    v[2, 3] *= 0.05
    values, scale = quantize.quantize_v_int8_even(v)
    assert values.shape == v.shape
    assert values.abs().max() <= 127.0
    by_key = scale.repeat_interleave(64, 1)[:, :300]
    assert ((v - values * by_key).abs() <= by_key * 0.5001).all()
    unit = v.square().mean(1, keepdim=True).sqrt()
    factors = scale / unit
    even = (factors - factors[..., :1]).abs().amax(-1) <= 1e-6 * factors[..., 0]
    assert even.tolist() == [[True] * 5, [True, True, False, True, True], [False] + [True] * 4]
    own = quantize.quantize_v_int8(v / unit, 64)[1]
    assert torch.equal(scale[~even], (own * unit)[~even])
    assert (factors[even].amax(-1) <= 2.5 * own[even].square().mean(-1).sqrt()).all()


def test_limits_of_even_blocks_are_the_kernels():
    text = (Path(__file__).parents[3] / "kernels/sm80/blocks.cuh").read_text()
    assert float(re.search(r"kEvenSpread = ([\d.]+)f;", text)[1]) == quantize.EVEN_SPREAD
    assert int(re.search(r"kSinkKeys = (\d+);", text)[1]) == quantize.SINK_KEYS
    assert float(re.search(r"kSinkLoudness = ([\d.]+)f;", text)[1]) == quantize.SINK_LOUDNESS


def test_accuracy_of_even_blocks_of_v():
    q, k, v = (make(1, 1, 2048, 128, seed=seed) for seed in range(3))
    out, _ = attend(q, k, v, "int8_int8", even_v=True)
    exact, _ = reference.exact_attention(q, k, v)
    assert relative_l1(out, exact) <= 0.0158


@pytest.mark.parametrize(("precision", "family"), [("int8_fp8", "mma"), ("int8_int8", "wgmma"), ("int4_int8", "mma")])
def test_other_rows_have_no_even_blocks_of_v(precision, family):
    with pytest.raises(ValueError, match="leave even_v out"):
        recipes.recipe_of(precision, family=family, even_v=True)
