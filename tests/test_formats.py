"""formats.py, quants.py: bit-equal to the `gguf` package's quantisers, with the error bounds each layout promises."""

from __future__ import annotations

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finial.errors import ModelError
from finial.formats import FORMATS, SLAB, Tensor, get_format

ENCODABLE = [name for name, row in FORMATS.items() if row.encode is not None]
QUANTISED = [name for name, row in FORMATS.items() if row.block > 1]

# Where the f16 scales of a block sit, in bytes: random bytes there could be infinities or NaNs.
SCALES = {
    "q8_0": [0], "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2],
    "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208],
}  # fmt: skip


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    assert FORMATS[name].gguf_type is not None
    return gguf.GGMLQuantizationType(FORMATS[name].gguf_type)


def random_blocks(name: str, count: int, seed: int) -> np.ndarray:
    """Random bytes whose scales are finite f16 values of every magnitude, subnormals, zeros and extremes included."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, FORMATS[name].block_bytes), dtype=np.uint8)
    for at in SCALES.get(name, []):
        bits = rng.integers(0, 0x7C00, count, dtype=np.uint16) | (rng.integers(0, 2, count, dtype=np.uint16) << 15)
        bits[:6] = [0, 0x8000, 1, 0x8001, 0x7BFF, 0xFBFF]
        blocks[:, at : at + 2] = bits[:, None].view(np.uint8)
    return blocks


def random_values(rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows of very different magnitude, with zero rows, exact halves, ties between +max and -max, and tiny values."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    values *= np.float32(10.0) ** rng.uniform(-12, 4, (rows, 1)).astype(np.float32)
    values[0] = 0
    values[1] = np.arange(columns) % 32 - 15.5
    values[2] = np.where(np.arange(columns) % 2, 3.0, -3.0)
    values[3] = -0.0
    values[4] = 127 * (np.arange(columns) % 5 - 2) / 2
    values[5, ::3] = 0
    return values


def test_the_table_says_what_ggml_says() -> None:
    for name, row in FORMATS.items():
        if row.gguf_type is None:  # no file has it
            assert name == "fp8"
            continue
        kind = gguf_type(name)
        assert kind.name.lower() == name == row.name
        assert gguf.GGML_QUANT_SIZES[kind] == (row.block, row.block_bytes)
        assert row.bits_per_weight == 8 * row.block_bytes / row.block


@pytest.mark.parametrize("name", QUANTISED)
def test_decoding_is_bit_equal_to_ggml(name: str) -> None:
    blocks = random_blocks(name, 700, seed=1)
    expected = gguf.quants.dequantize(blocks, gguf_type(name))
    row = FORMATS[name]
    assert np.array_equal(row.decode(blocks).view(np.uint32), expected.view(np.uint32))
    tensor = Tensor(name, (7, 100 * row.block), blocks.reshape(-1))
    assert np.array_equal(tensor.decode(), expected.reshape(7, -1))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_every_sixteen_bit_float_decodes_and_comes_back(name: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    tensor = Tensor(name, (65536,), bits.view(np.uint8))
    expected = gguf.quants.dequantize(bits.view(np.uint8), gguf_type(name))
    values = tensor.decode()
    assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))
    back = Tensor.from_array(values).to(name).data.view(np.uint16)
    number = ~np.isnan(values)
    assert np.array_equal(back[number], bits[number])
    assert np.isnan(Tensor(name, (65536,), back.view(np.uint8)).decode()[~number]).all()


@pytest.mark.parametrize("name", [name for name in ENCODABLE if name != "fp8"])
@pytest.mark.parametrize("seed", range(3))
def test_encoding_is_bit_equal_to_ggml(name: str, seed: int) -> None:
    values = random_values(64, 256, seed)
    expected = gguf.quants.quantize(values, gguf_type(name)).view(np.uint8).reshape(-1)
    assert np.array_equal(Tensor.from_array(values, name).data, expected)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32))
@settings(max_examples=200)
def test_any_float_bits_encode_to_bf16_as_ggml_does(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    expected = gguf.quants.quantize(values, gguf_type("bf16"))
    assert np.array_equal(Tensor.from_array(values, "bf16").data, expected.reshape(-1).view(np.uint8))


def test_halves_round_to_even() -> None:
    one, step = np.float32(1), np.float32(2.0**-7)  # bf16 keeps 8 bits of significand
    values = np.array([one + step / 2, one + 3 * step / 2, one + step / 2 * np.float32(1.001)], np.float32)
    assert Tensor.from_array(values, "bf16").decode().tolist() == [1.0, float(one + 2 * step), float(one + step)]
    step = np.float32(2.0**-10)  # f16 keeps 11
    values = np.array([one + step / 2, one + 3 * step / 2], np.float32)
    assert Tensor.from_array(values, "f16").decode().tolist() == [1.0, float(one + 2 * step)]


@pytest.mark.parametrize("name", ENCODABLE)
def test_round_trip_error_is_within_the_format(name: str) -> None:
    values = np.random.default_rng(5).standard_normal((50, 320)).astype(np.float32)
    error = np.abs(Tensor.from_array(values, name).decode() - values).astype(np.float64)
    largest = np.abs(values.reshape(-1, 32)).max(axis=1).repeat(32).reshape(values.shape).astype(np.float64)
    half, single = 2.0**-11, 2.0**-23  # relative rounding of the stored f16 scale; of the float32 arithmetic
    bound = {
        "f32": np.zeros_like(largest),
        "f16": np.abs(values) * half + 2.0**-25,
        "bf16": np.abs(values) * 2.0**-8,
        # half a level of max/127, plus the scale's rounding times the largest level
        "q8_0": largest / 127 * 0.5 + largest * (half + 4 * single),
        # levels -8..7 of max/8: the far end (+8) is clipped to 7, one whole level away
        "q4_0": largest / 8 * 1.0 + largest * (half + 4 * single),
        # half a step: 2^-4 of the value, or 2^-10 of 1/448 of the row's largest where the format is subnormal
        "fp8": np.maximum(np.abs(values) * 2.0**-4, np.abs(values).max(1, keepdims=True) / 448 * 2.0**-10)
        * (1 + 4 * single),
    }[name]
    assert (error <= bound).all()


def test_conversion_works_in_slabs() -> None:
    """Six million elements converted with temporaries of a few MB, equal to a conversion in one piece."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal((24, SLAB)).astype(np.float32)
    source = Tensor.from_array(values, "bf16")
    tracemalloc.start()
    result = source.to("q8_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - result.nbytes < 10e6
    encode = FORMATS["q8_0"].encode
    assert encode is not None
    assert np.array_equal(result.data, encode(source.decode().reshape(-1, 32)).reshape(-1))
    assert np.array_equal(np.concatenate(list(source.slabs("q8_0"))), result.data)
    assert np.array_equal(np.concatenate(list(source.slabs())), source.data)


def test_to_between_every_pair() -> None:
    values = random_values(8, 512, 3)
    for name in ENCODABLE:
        start = Tensor.from_array(values, name)
        assert start.to(name) is start
        for other in set(ENCODABLE) - {name}:
            assert np.array_equal(start.to(other).data, Tensor.from_array(start.decode(), other).data)
    for name in QUANTISED:
        block = FORMATS[name].block
        start = Tensor(name, (16, block), random_blocks(name, 16, 4).reshape(-1))
        assert np.array_equal(start.to("f32").decode(), start.decode())


@pytest.mark.parametrize("shape", [(7, 96), (3, 1), (5, 300), (2, SLAB + 1)])
def test_fp8_is_e4m3_scaled_by_row(shape: tuple[int, int]) -> None:
    """The bits of PyTorch's float8_e4m3fn, subnormals and zeros among them; rows of any width."""
    import torch

    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    values *= np.logspace(-3, 0, shape[1], dtype=np.float32)
    values[1] = 0
    tensor = Tensor.from_array(values, "fp8")
    assert tensor.nbytes == shape[0] * (shape[1] + 4) == get_format("fp8").nbytes(shape)
    rows = tensor.data.reshape(shape[0], -1)
    scale = rows[:, :4].copy().view(np.float32)
    assert scale[1] == 1 and np.array_equal(np.delete(scale, 1, 0)[:, 0] * 448, np.abs(np.delete(values, 1, 0)).max(1))
    expected = torch.from_numpy(values / scale).to(torch.float8_e4m3fn)
    assert np.array_equal(rows[:, 4:], expected.view(torch.uint8).numpy())
    assert np.array_equal(tensor.decode(), expected.float().numpy() * scale)
    # Half a step of 2^-3 below a power of two for normal numbers, half of 2^-9 of the scale below.
    assert (np.abs(tensor.decode() - values) <= np.maximum(np.abs(values) * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()


def test_no_value_is_beyond_fp8_but_what_is_not_finite() -> None:
    for value in (np.inf, np.nan):
        with pytest.raises(ModelError, match="cannot be written as fp8"):
            Tensor.from_array(np.array([[1, value]], np.float32), "fp8")
    huge = np.array([[3e38, -1e30], [1e-42, 1e-41]], np.float32)
    assert Tensor.from_array(huge, "fp8").decode()[0, 0] == pytest.approx(3e38, rel=2**-4)
    assert not Tensor.from_array(huge, "fp8").decode()[1].any()


def test_rows_pick_bytes() -> None:
    values = random_values(12, 64, 6)
    index = np.array([3, 0, 11, 3])
    for name in ENCODABLE:
        tensor = Tensor.from_array(values, name)
        picked = tensor.rows(index)
        assert picked.shape == (4, 64) and picked.format == name
        assert np.array_equal(picked.decode(), tensor.decode()[index])
    vector = Tensor.from_array(values[4], "bf16").rows(np.array([5, 1]))
    assert vector.shape == (2,)
    for name, shared in (("q8_0", "share blocks of 32"), ("fp8", "share one scale")):
        with pytest.raises(ModelError, match=shared):
            Tensor.from_array(values[4], name).rows(np.array([0]))


def test_shapes_without_elements_and_scalars() -> None:
    for name in ENCODABLE:
        empty = Tensor.from_array(np.zeros((0, 32), np.float32), name)
        assert empty.nbytes == 0 and empty.decode().shape == (0, 32) and empty.to("f16").shape == (0, 32)
        assert list(empty.slabs("bf16")) == []
    scalar = Tensor.from_array(np.float32(2.5).reshape(()), "bf16")
    assert scalar.shape == () and scalar.size == 1 and float(scalar.decode()) == 2.5


def test_reading_only_and_unaligned_data() -> None:
    raw = bytes(3) + np.arange(5, dtype="<f4").tobytes()
    tensor = Tensor("f32", (5,), np.frombuffer(raw, np.uint8)[3:])
    assert tensor.decode().tolist() == [0, 1, 2, 3, 4]
    assert tensor.to("f16").decode().tolist() == [0, 1, 2, 3, 4]
    values = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    assert Tensor.from_array(values).decode().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Tensor.from_array(np.arange(4, dtype=np.float16), "f16").format == "f16"


def test_errors_name_the_value_and_the_way_out() -> None:
    with pytest.raises(ModelError, match="'q9_9'") as caught:
        get_format("q9_9")
    assert "q8_0" in caught.value.fix and "q6_k" in caught.value.fix
    tensor = Tensor.from_array(np.ones((4, 48), np.float32))
    with pytest.raises(ModelError, match=r"\[4, 48\].*q8_0.*multiple of 32"):
        tensor.to("q8_0")
    with pytest.raises(ModelError, match="does not write") as caught:
        Tensor.from_array(np.ones((4, 256), np.float32)).to("q4_k")
    assert "q8_0" in caught.value.fix
    with pytest.raises(ModelError, match="q8_0"):
        Tensor.from_array(np.float32(1).reshape(()), "q8_0")


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e9, -1e9])
@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_values_beyond_a_format_are_refused(name: str, value: float) -> None:
    values = np.ones(64, np.float32)
    values[40] = value
    with pytest.raises(ModelError, match=f"cannot be written as {name}"):
        Tensor.from_array(values, name)


def test_half_floats_refuse_overflow_and_keep_infinities() -> None:
    with pytest.raises(ModelError, match=r"70000.*f16.*65504"):
        Tensor.from_array(np.array([1, 70000], np.float32), "f16")
    assert Tensor.from_array(np.array([65504, -np.inf], np.float32), "f16").decode().tolist() == [65504, -np.inf]


def test_blocks_too_small_for_their_scale_are_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("q8_0", "q4_0"):
            assert not Tensor.from_array(np.full(32, 1e-42, np.float32), name).decode().any()


def test_a_damaged_scale_decodes_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in QUANTISED:
            row = FORMATS[name]
            Tensor(name, (row.block,), np.full(row.block_bytes, 0xFF, np.uint8)).decode()
            Tensor(name, (row.block,), np.full(row.block_bytes, 0x7C, np.uint8)).to("bf16")


def test_a_tensor_re_encoded_later_is_the_tensor_re_encoded() -> None:
    stored = Tensor.from_array(np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64), "bf16")
    later = stored.later("q8_0", "w")
    assert later.format == "q8_0" and later.shape == stored.shape and later.nbytes == 4 * 68
    assert np.array_equal(later.data, stored.to("q8_0").data) and later.data is not later.data
    assert np.array_equal(later.decode(), stored.to("q8_0").decode())
    assert stored.later("bf16", "w") is stored
    with pytest.raises(ModelError, match="does not write"):
        Tensor.from_array(np.zeros((1, 256), np.float32)).later("q4_k", "w")
    with pytest.raises(ModelError, match="multiple of 32"):
        Tensor.from_array(np.zeros((2, 33), np.float32)).later("q8_0", "w")
    huge = Tensor.from_array(np.full((1, 32), 1e30, np.float32)).later("f16", "w")
    with pytest.raises(ModelError, match="w: "):
        huge.data  # noqa: B018
