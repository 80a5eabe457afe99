# SPDX-License-Identifier: Apache-2.0
"""The accuracy set: distributions repeat, and the simulated recipe is as accurate as what it simulates."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import distributions  # noqa: E402
import sage2_recipe  # noqa: E402

from sagert import reference  # noqa: E402

SMALL = {"heads": 2, "seqlen": 640, "head_dim": 64}


@pytest.mark.parametrize("name", distributions.NAMES)
def test_distributions_repeat(name):
    first, second, other = (distributions.draw(name, **SMALL, heads_kv=1, seed=seed) for seed in (3, 3, 4))
    for tensor, heads in zip(first, (2, 1, 1), strict=True):
        assert tensor.shape == (1, heads, 640, 64)
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        assert torch.isfinite(tensor).all()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_distributions_differ():
    drawn = {name: distributions.draw(name, **SMALL) for name in distributions.NAMES}
    for name, tensors in drawn.items():
        same = all(torch.equal(a, b) for a, b in zip(tensors, drawn["normal"], strict=True))
        assert same == (name == "normal")


def test_unknown_distribution():
    with pytest.raises(ValueError, match="normal"):
        distributions.draw("uniform")


def test_sink_tokens_draw_ten_more_logits():
    q, k, _ = (x.float() for x in distributions.draw("sink", **SMALL))
    logits = (q @ k.transpose(-1, -2) * 64**-0.5).mean((0, 1, 2))
    assert logits[:4].mean() - logits[4:].mean() == pytest.approx(10.0, abs=1.0)


def simulated_error(name, is_causal=False, **options):
    q, k, v = distributions.draw(name, heads=2, heads_kv=1, seqlen=640, head_dim=64)
    exact, _ = reference.exact_attention(q, k, v, is_causal=is_causal)
    out = sage2_recipe.attention(q, k, v, is_causal=is_causal, **options)
    return reference.error_metrics(out, exact)["relative_l1"]


@pytest.mark.parametrize(("is_causal", "error"), [(False, 0.038), (True, 0.036)])  # the first causal rows see few keys
def test_simulated_recipe_on_normal_inputs(is_causal, error):
    assert simulated_error("normal", is_causal) == pytest.approx(error, rel=0.06)


def test_short_accumulator_costs_accuracy_where_v_is_biased():
    assert simulated_error("v_bias") > 1.05 * simulated_error("v_bias", bits=None)
    assert simulated_error("normal") == pytest.approx(simulated_error("normal", bits=None), rel=0.01)


def test_truncating_matmul_keeps_the_bits_it_says():
    p, v = torch.ones(1, 1, 64), torch.zeros(1, 64, 1)
    v[0, 0], v[0, 40] = 256.0, 2.0**-5  # bit 14 of the sum
    assert sage2_recipe.truncating_matmul(p, v, 14).item() == 256.0 + 2.0**-5
    assert sage2_recipe.truncating_matmul(p, v, 13).item() == 256.0
    assert sage2_recipe.truncating_matmul(p, -v, 13).item() == -256.0


def test_groups_of_one_thread():
    rows, keys = sage2_recipe.thread_groups(256, torch.device("cpu"))
    assert (rows[:16] == torch.arange(8).repeat(2)).all()
    assert rows.bincount().tolist() == [2] * 128
    assert keys[:10].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert keys.bincount().tolist() == [32] * 8


@pytest.mark.parametrize(("name", "of_fp8"), [("sink", 0.5), ("v_bias", 0.9)])
@pytest.mark.parametrize("causal", [False, True])
def test_leading_keys_stay_out_of_bytes(name, of_fp8, causal):
    q, k, v = distributions.draw(name, **SMALL)
    want, _ = reference.exact_attention(q, k, v, is_causal=causal)
    error = {}
    for precision in ("int8_int8", "int8_fp8"):
        out, _ = reference.attention(q, k, v, is_causal=causal, precision=precision, family="wgmma")
        error[precision] = reference.error_metrics(out, want)["relative_l1"]
    assert error["int8_int8"] < of_fp8 * error["int8_fp8"], error
