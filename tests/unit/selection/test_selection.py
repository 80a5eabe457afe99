# SPDX-License-Identifier: Apache-2.0
"""Selection over invented devices and requests, for the invented table and for the real one.

`expected` says what selection promises in a few lines of Python, from the rows alone.
"""

import itertools

import pytest

from tests.kit import abi

CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
DRIVERS = (11080, 12000, 12080, 12090, 13000)
PRECISIONS = (abi.AUTO, abi.INT8_FP16, abi.INT8_FP8, abi.INT8_INT8, abi.INT4_FP8, abi.NVFP4)
REQUESTS = {
    "plain": {},
    "fp16 d64 causal": {"dtype": abi.FP16, "head_dim": 64, "flags": abi.CAUSAL},
    "d72 lse": {"head_dim": 72, "flags": abi.LSE},
    "d1": {"head_dim": 1},
    "no smoothing": {"flags": abi.NO_SMOOTH_K | abi.LSE | abi.CAUSAL},
    "empty": {"batch": 0},
    "no keys": {"seqlen_k": 0},
    "mask": {"flags": abi.MASK | abi.LSE, "mask_dtype": abi.BOOL},
    "mask and window": {"flags": abi.MASK | abi.WINDOW | abi.CAUSAL, "mask_dtype": abi.FP32, "window_right": -1},
    "window": {"flags": abi.WINDOW, "window_left": 100},
    "bottom right": {"flags": abi.CAUSAL | abi.BOTTOM_RIGHT},
    "packed": {"flags": abi.VARLEN | abi.LSE},
    "d129": {"head_dim": 129},
    "d256": {"head_dim": 256, "dtype": abi.FP16},
    "long": {"batch": 1, "seqlen_q": 8388608, "seqlen_k": 8388608, "heads_q": 1, "heads_kv": 1},
}
REFUSED = {  # request, code of the reason that every row for the device has
    "fp32": ({"dtype": abi.FP32}, "dtype", "cast to bf16"),
    "d129": ({"head_dim": 129}, "head_dim", "head_dim of at most 128"),
    "d257": ({"head_dim": 257, "head_dim_v": 64}, "head_dim", "head_dim of at most"),
    "dv257": ({"head_dim": 64, "head_dim_v": 257}, "head_dim_v", "head_dim"),
    "dv": ({"head_dim": 128, "head_dim_v": 64}, "head_dim_v", "pad head_dim_v to 128"),
    "dv larger": ({"head_dim": 64, "head_dim_v": 96}, "head_dim_v", "pad head_dim to 96"),
    "queries": ({"seqlen_q": 8388609}, "seqlen_q", "split the queries"),
    "keys": ({"seqlen_k": 8388609}, "seqlen_k", "at most 8388608 keys"),
    "mask": ({"flags": abi.MASK, "mask_dtype": abi.BOOL}, "mask", "drop attn_mask"),
    "dropout": ({"flags": abi.DROPOUT}, "dropout", "set dropout_p to 0"),
    "grad": ({"flags": abi.GRAD}, "grad", "no_grad"),
    "varlen": ({"flags": abi.VARLEN}, "varlen", "padded"),
    "window": ({"flags": abi.WINDOW}, "window", "drop the window"),
    "bottom right": ({"flags": abi.CAUSAL | abi.BOTTOM_RIGHT}, "bottom_right", "top-left"),
    "quantized": ({"flags": abi.QUANTIZED_KV | abi.VARLEN}, "quantized_kv", "pass k and v"),
    "grid": ({"batch": 1 << 31}, "grid", "split the batch"),
}


SERVED_BY_GENERAL_ROWS = ("d129", "dv", "dv larger", "mask", "varlen", "window", "bottom right")  # where there are any


@pytest.fixture(scope="module")
def table(any_library):
    return abi.Library(any_library)


def serves(row, req, dev):
    """Whether a row serves a good request: the promise, without reasons."""
    accurate = row.accuracy <= 1 if req.precision == abi.AUTO else row.precision == req.precision
    return (
        row.capability_min <= dev.capability <= row.capability_max
        and row.driver_min <= dev.driver_version
        and accurate
        and row.dtypes >> req.dtype & 1
        and req.head_dim <= row.head_dim_max
        and not req.flags & ~row.flags
    )


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_best_rank_among_survivors(table, capability, driver, name):
    rows = table.rows()
    dev = abi.device(capability, driver)
    for precision in PRECISIONS:
        req = abi.request(precision=precision, **REQUESTS[name])
        status, selection = table.select(req, dev)
        survivors = [row for row in rows if serves(row, req, dev)]
        report = table.explain(req, dev)
        assert [row["id"] for row in report["rows"]] == [row.id.decode() for row in rows]
        assert [row["accepted"] for row in report["rows"]] == [bool(serves(row, req, dev)) for row in rows]
        for row in report["rows"]:
            assert row["accepted"] == (not row["reasons"])
            assert all(reason["code"] and reason["text"] for reason in row["reasons"])
        if survivors:
            ranks = {row["id"].encode(): row["rank"] for row in report["rows"]}
            best = min(survivors, key=lambda row: ranks[row.id])
            assert status == abi.OK
            assert rows[selection.row].id == best.id
            assert selection.variant >= 0
            assert report["selected"] == best.id.decode()
            assert report["nearest"] is report["hint"] is None
            assert [ranks[row.id] for row in survivors].count(ranks[best.id]) == 1  # no two rows tie
        else:
            assert status == abi.UNSUPPORTED
            assert selection.row == selection.variant == -1
            assert report["selected"] is None
            assert report["nearest"]
            assert report["hint"]
            text = table.error()
            assert f"nearest row: {report['nearest']}" in text
            assert report["hint"] in text
            assert f"compute capability {capability // 10}.{capability % 10}" in text


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_refusals_name_the_reason_and_the_change(table, capability, name):
    changes, code, hint = REFUSED[name]
    dev = abi.device(capability, 13000)
    req = abi.request(**changes)
    if table.select(abi.request(), dev)[0] != abi.OK:
        pytest.skip("no row for this device in this build")
    status, _ = table.select(req, dev)
    if status == abi.OK:
        assert name in SERVED_BY_GENERAL_ROWS
        return
    assert status == abi.UNSUPPORTED
    assert hint in table.error()
    report = table.explain(req, dev)
    for row in report["rows"]:
        codes = [reason["code"] for reason in row["reasons"]]
        assert code in codes or "capability" in codes
    assert hint in report["hint"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_newer_drivers_lose_nothing(table, capability):
    for precision, changes in itertools.product(PRECISIONS, REQUESTS.values()):
        req = abi.request(precision=precision, **changes)
        accepted = [table.select(req, abi.device(capability, driver))[0] == abi.OK for driver in sorted(DRIVERS)]
        assert accepted == sorted(accepted)


def test_every_row_is_reachable(table):
    """A device and a request for which the row wins."""
    rows = table.rows()
    reached = set()
    shapes = itertools.product((abi.FP16, abi.BF16), (64, 128), (64, 1000, 32768), (0, abi.CAUSAL, abi.VARLEN))
    for row, (dtype, head_dim, length, flags) in itertools.product(rows, list(shapes)):
        drivers = {row.driver_min, *(other.driver_min for other in rows)}
        for capability, driver in itertools.product((row.capability_min, row.capability_max), drivers):
            req = abi.request(
                precision=row.precision, dtype=dtype, head_dim=head_dim, seqlen_q=length, seqlen_k=length, flags=flags
            )
            status, selection = table.select(req, abi.device(capability, driver))
            if status == abi.OK:
                reached.add(rows[selection.row].id)
    assert reached == {row.id for row in rows}


def test_no_two_rows_that_can_meet_have_equal_ranks(table):
    for a, b in itertools.combinations(table.rows(), 2):
        meet = a.capability_min <= b.capability_max and b.capability_min <= a.capability_max and a.dtypes & b.dtypes
        assert not meet or a.rank != b.rank, (a.id, b.id)


def test_row_strings_are_json(table):
    import json

    for row in table.rows():
        assert isinstance(json.loads(row.axes_json), dict)
        assert isinstance(json.loads(row.quant_json), dict)
        assert row.id.startswith(row.bundle)
        assert row.family


@pytest.mark.parametrize("head_dim", range(1, 129, 9))
@pytest.mark.parametrize("causal", [0, abi.CAUSAL])
def test_variant_is_a_function_of_padded_head_dim(lib, head_dim, causal):
    def variant(d):
        return lib.select(abi.request(head_dim=d, flags=causal), abi.device(90))[1].variant

    assert variant(head_dim) == variant(64 if head_dim <= 64 else 128)
    assert (
        len({variant(64), variant(128), lib.select(abi.request(flags=0, dtype=abi.FP16), abi.device(90))[1].variant})
        == 3
    )


def test_auto_leaves_low_accuracy_alone_until_asked(lib):
    """The invented int4_fp8 row has the best rank of all and accuracy class low."""
    rows = lib.rows()
    assert rows[lib.select(abi.request(), abi.device(90))[1].row].id == b"sm90.fake.int8_fp8"
    assert rows[lib.select(abi.request(precision=abi.INT4_FP8), abi.device(90))[1].row].id == b"sm90.fake.int4_fp8"
    refused = lib.explain(abi.request(), abi.device(90))["rows"][5]
    assert refused["reasons"] == [
        {"code": "accuracy", "text": "has accuracy class low; auto chooses among high and standard"}
    ]


@pytest.mark.parametrize(("driver", "row"), [(12000, "int8_fp8"), (12090, "int8_fp8"), (13000, "int8_fp8_cu13")])
def test_the_driver_chooses_among_builds(lib, driver, row):
    assert lib.explain(abi.request(), abi.device(90, driver))["selected"] == f"sm90.fake.{row}"


def test_texts(lib):
    def reasons(req, dev, row):
        found = next(entry for entry in lib.explain(req, dev)["rows"] if entry["id"] == row)
        return [reason["text"] for reason in found["reasons"]]

    assert reasons(abi.request(), abi.device(89), "sm90.fake.int8_fp16") == [
        "needs compute capability 9.0; this device has 8.9"
    ]
    assert reasons(abi.request(), abi.device(121, 12070), "sm120.fake.int8_fp16") == [
        "needs a driver with CUDA 12.8 (R570); this driver has CUDA 12.7"
    ]
    assert lib.explain(abi.request(), abi.device(120, 12000))["hint"] == "update the driver to R570 or later"
    assert lib.explain(abi.request(precision=abi.INT8_FP8), abi.device(120))["hint"] == "ask for precision int8_fp16"
    assert "these GPUs have no FP8 tensor cores" in reasons(
        abi.request(precision=abi.INT8_FP8), abi.device(86), "sm89.fake.int8_fp8"
    )
    lib.select(abi.request(precision=abi.INT8_FP8), abi.device(86))
    assert "int8_fp8: these GPUs have no FP8 tensor cores" in lib.error()
    assert lib.explain(abi.request(), abi.device(75))["hint"] == "use a GPU of compute capability 8.0 to 8.7"


INT8_INT8_RANKS = [  # request, rank of the invented int8_int8 row, row that auto takes
    ({}, 80, "int8_int8"),
    ({"flags": abi.CAUSAL}, 120, "int8_fp8"),
    ({"flags": abi.CAUSAL, "head_dim": 65}, 120, "int8_fp8"),
    ({"flags": abi.CAUSAL, "head_dim": 64}, 80, "int8_int8"),
    ({"flags": abi.CAUSAL, "seqlen_q": 2048}, 120, "int8_fp8"),
    ({"flags": abi.CAUSAL, "seqlen_q": 2049}, 80, "int8_int8"),
    ({"seqlen_q": 512}, 95, "int8_fp8"),  # 64 tiles
    ({"seqlen_q": 513}, 80, "int8_int8"),
    ({"seqlen_q": 0}, 95, "int8_fp8"),
    ({"seqlen_q": 512, "flags": abi.CAUSAL}, 120, "int8_fp8"),  # the first entry that fits
    ({"seqlen_k": 4095}, 80, "int8_int8"),
    ({"seqlen_k": 4096}, 110, "int8_fp8"),
    ({"seqlen_k": 8191}, 110, "int8_fp8"),
    ({"seqlen_k": 8192}, 80, "int8_int8"),
]


@pytest.mark.parametrize(("changes", "rank", "chosen"), INT8_INT8_RANKS, ids=str)
def test_rank_depends_on_the_request(lib, changes, rank, chosen):
    report = lib.explain(abi.request(**changes), abi.device(100))
    ranks = {row["id"]: row["rank"] for row in report["rows"]}
    assert ranks["sm100.fake.int8_int8"] == rank
    assert ranks["sm100.fake.int8_fp8"] == 90
    assert report["selected"] == f"sm100.fake.{chosen}"
    named = lib.explain(abi.request(precision=abi.INT8_INT8, **changes), abi.device(100))
    assert named["selected"] == "sm100.fake.int8_int8"
    assert [row.rank for row in lib.rows() if row.id == b"sm100.fake.int8_int8"] == [80]


@pytest.mark.parametrize("name", [b"", b'GPU \xff\xfe"\\\n', b"x" * 128])
def test_any_device_name_gives_json(lib, name):
    dev = abi.device(75)
    dev.name = name
    assert lib.explain(abi.request(), dev)["selected"] is None
    assert lib.select(abi.request(), dev)[0] == abi.UNSUPPORTED


def test_selection_is_pure(lib):
    req, dev = abi.request(), abi.device()
    before = bytes(req), bytes(dev)
    answers = {(lib.select(req, dev)[1].row, lib.select(req, dev)[1].variant) for _ in range(50)}
    assert len(answers) == 1
    assert (bytes(req), bytes(dev)) == before


GENERAL = [  # request, row of the invented table that auto takes on capability 8.9
    ({}, "int8_fp8"),
    ({"flags": abi.CAUSAL | abi.LSE}, "int8_fp8"),
    ({"flags": abi.MASK, "mask_dtype": abi.BF16}, "general_int8_fp8"),
    ({"flags": abi.MASK, "mask_dtype": abi.BOOL, "precision": abi.INT8_FP16}, "general_int8_fp16"),
    ({"flags": abi.WINDOW, "window_left": 5}, "general_int8_fp8"),
    ({"flags": abi.VARLEN | abi.CAUSAL}, "general_int8_fp8"),
    ({"flags": abi.BOTTOM_RIGHT | abi.CAUSAL}, "general_int8_fp8"),
    ({"head_dim": 129}, "general_int8_fp8"),
    ({"head_dim": 192, "head_dim_v": 128, "precision": abi.INT8_FP16}, "general_int8_fp16"),
    ({"head_dim": 64, "head_dim_v": 256}, "general_int8_fp8"),
    ({"head_dim": 64, "head_dim_v": 65}, "general_int8_fp8"),
]


@pytest.mark.parametrize(("changes", "row"), GENERAL, ids=str)
def test_general_rows_take_what_plain_rows_leave(lib, changes, row):
    assert lib.explain(abi.request(**changes), abi.device(89))["selected"] == f"sm89.fake.{row}"


INT4 = (abi.INT4_FP16, abi.INT4_FP8, abi.INT4_INT8)
TUNED = {80: b"mma", 86: b"mma", 87: b"mma", 89: b"mma", 90: b"wgmma", 120: b"mma", 121: b"mma"}  # families by device


@pytest.mark.parametrize("capability", TUNED)
def test_the_tuned_rows_serve_what_they_can(real_library, capability):
    """Plain attention goes to a tuned family's rows wherever one can compute it, all else to the portable family's."""
    table = abi.Library(real_library)
    rows, dev = table.rows(), abi.device(capability, 13000)
    here = [row for row in rows if row.capability_min <= capability <= row.capability_max]
    if not here:
        pytest.skip("no rows for this device in this build")
    precisions = {row.precision for row in here}
    assert precisions >= {abi.INT8_FP16, abi.INT8_INT8}
    plain = [{"head_dim": d, "flags": flags} for d in (40, 64, 96, 128) for flags in (0, abi.LSE, abi.CAUSAL | abi.LSE)]
    for precision, dtype, changes in itertools.product(
        [abi.AUTO, *precisions], (abi.FP16, abi.BF16), [*plain, *REQUESTS.values()]
    ):
        req = abi.request(**{"precision": precision, "dtype": dtype, **changes})
        able = {row.family for row in rows if serves(row, req, dev)}
        status, selection = table.select(req, dev)
        if precision in INT4 and changes not in plain and not able:  # no general rows: refused, not replaced
            assert status == abi.UNSUPPORTED, changes
            continue
        chosen = rows[selection.row].family
        assert chosen == (TUNED[capability] if TUNED[capability] in able else b"portable"), (changes, able)
        assert changes not in plain or chosen == TUNED[capability], changes


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 121])
@pytest.mark.parametrize(("changes", "_"), GENERAL, ids=str)
def test_every_architecture_serves_every_feature(real_library, capability, changes, _):
    table = abi.Library(real_library)
    dev = abi.device(capability, 13000)
    if not any(row.capability_min <= capability <= row.capability_max for row in table.rows()):
        pytest.skip("no rows for this device in this build")
    assert table.select(abi.request(**changes), dev)[0] == abi.OK


def test_the_nearest_row_is_the_widest(lib):
    assert lib.explain(abi.request(head_dim=257), abi.device(89))["hint"] == "use a head_dim of at most 256"


@pytest.mark.parametrize("flags", [abi.MASK | abi.VARLEN, abi.MASK | abi.VARLEN | abi.CAUSAL])
def test_masks_need_sequences_of_one_length(lib, flags):
    assert lib.select(abi.request(flags=flags, mask_dtype=abi.BOOL), abi.device(89))[0] == abi.INVALID_ARGUMENT
    assert "FLAG_MASK and FLAG_VARLEN" in lib.error()
