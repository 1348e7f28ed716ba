"""Tensors and plans survive the wire within their stated error, and nothing malformed gets through."""

import tracemalloc
import zlib

import numpy as np
import pytest

from hybridsd import codec, noise
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.plan import Plan, PlanRow
from hybridsd.v1 import plan_pb2, tensor_pb2

LATENTS = noise.initial_latents(0, 0, (4, 16, 16))


def test_fp32_is_exact() -> None:
    """float32 comes back to the last bit."""
    message = codec.encode_tensor(LATENTS, codec.FLOAT32)

    np.testing.assert_array_equal(LATENTS, codec.decode_tensor(message))
    assert len(message.data) == LATENTS.size * 4


def test_fp16_error_is_relative() -> None:
    """float16 errs by at most 2^-11 of a value, and saturates instead of overflowing."""
    wide = np.array([[1.0, -3.14159, 1e6, -1e6]], dtype=np.float32)
    decoded = codec.decode_tensor(codec.encode_tensor(wide, codec.FLOAT16))
    np.testing.assert_allclose(wide[:, :2], decoded[:, :2], rtol=2**-11)

    assert decoded[0, 2:].tolist() == [65504.0, -65504.0]


def test_int8_error_is_half_a_step_of_its_channel() -> None:
    """int8 errs by at most half of the channel's largest magnitude / 127; a loud channel does not spoil a quiet one."""
    array = LATENTS * np.array([1.0, 100.0, 0.01, 0.0], dtype=np.float32).reshape(4, 1, 1)
    decoded = codec.decode_tensor(codec.encode_tensor(array, codec.INT8))
    step = np.abs(array).max(axis=(1, 2)) / 127

    assert (np.abs(decoded - array).max(axis=(1, 2)) <= step * 0.5001).all()


def test_sizes_on_the_wire() -> None:
    """A 512x512 latent is 64, 32 or 16 KiB and a few bytes."""
    array = noise.initial_latents(0, 0, (4, 64, 64))
    sizes = {name: codec.encode_tensor(array, e).ByteSize() for name, e in codec.ENCODINGS.items()}

    assert sizes.pop("int8z") < 15500  # noise has little to deflate
    assert {name: size // 64 * 64 for name, size in sizes.items()} == {"fp32": 65536, "fp16": 32768, "int8": 16384}


def texts() -> np.ndarray:
    """Embeddings of a short text: rows of padding, each near to the one before, and a feature of large values."""
    rng = np.random.default_rng(0)
    rows = np.cumsum(rng.normal(size=(77, 768)) * 0.1, axis=0) + rng.normal(size=768)
    rows[:, 133] = -28.0
    return rows.astype(np.float32)


@pytest.mark.parametrize("array", [LATENTS, texts(), np.zeros((3, 5), np.float32), np.full((1,), -2.5, np.float32)])
def test_int8z_is_int8_in_fewer_bytes(array: np.ndarray) -> None:
    """The values are those of int8, to the last bit."""
    plain, packed = (codec.encode_tensor(array, each) for each in (codec.INT8, codec.INT8_DEFLATE))
    np.testing.assert_array_equal(codec.decode_tensor(packed), codec.decode_tensor(plain))
    assert packed.scale == plain.scale
    assert array.size < 100 or len(packed.data) < len(plain.data)


def test_int8z_goes_by_differences_where_rows_are_near() -> None:
    """Embeddings take a third of int8."""
    assert len(codec.encode_tensor(texts(), codec.INT8_DEFLATE).data) < texts().size / 3


def deflated(content: bytes, *, end: bool = True) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush(zlib.Z_FINISH if end else zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "DEFLATE"),
        (bytes(7), "DEFLATE"),
        (b"\xff" * 7, "DEFLATE"),
        (zlib.compress(bytes(7)), "DEFLATE"),  # with a header
        (deflated(bytes(6)), "DEFLATE"),
        (deflated(bytes(8)), "DEFLATE"),
        (deflated(b"\2" + bytes(6)), "DEFLATE"),
        (deflated(bytes(7), end=False), "DEFLATE"),
        (deflated(bytes(7)) + b"x", "DEFLATE"),
        (deflated(b"\0\x80" + bytes(5)), "-128"),
        (deflated(bytes(2**28)), "DEFLATE"),  # a bomb of 256 MiB
    ],
)
def test_a_stream_that_is_none_is_refused(data: bytes, said: str) -> None:
    message = tensor_pb2.Tensor(encoding=codec.INT8_DEFLATE, shape=[2, 3], data=data, scale=[1.0, 1.0])
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=said):
            codec.decode_tensor(message, field="embeddings")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_little_endian_on_the_wire() -> None:
    """1.0 in float32 is 00 00 80 3f."""
    assert codec.encode_tensor(np.array([1.0], dtype=np.float32), codec.FLOAT32).data == b"\x00\x00\x80\x3f"


def good() -> tensor_pb2.Tensor:
    return codec.encode_tensor(np.ones((2, 3), dtype=np.float32), codec.FLOAT32)


BROKEN = {
    "encoding": lambda m: setattr(m, "encoding", 0),
    "unknown encoding": lambda m: setattr(m, "encoding", 99),
    "no shape": lambda m: m.ClearField("shape"),
    "five axes": lambda m: m.shape.extend([1, 1, 1]),
    "negative axis": lambda m: m.shape.__setitem__(0, -2),
    "zero axis": lambda m: m.shape.__setitem__(0, 0),
    "huge shape": lambda m: m.shape.__setitem__(slice(0, 2), [65536, 65536]),
    "short data": lambda m: setattr(m, "data", m.data[:-1]),
    "long data": lambda m: setattr(m, "data", m.data + b"\0"),
    "no data": lambda m: m.ClearField("data"),
    "scale without int8": lambda m: m.scale.append(1.0),
    "six thousand axes": lambda m: m.shape.extend([1] * 6000),
    "beyond float16": lambda m: setattr(m, "data", np.full(6, 1e5, "<f4").tobytes()),
    "nan": lambda m: setattr(m, "data", np.full(6, np.nan, "<f4").tobytes()),
    "infinity": lambda m: setattr(m, "data", np.full(6, np.inf, "<f4").tobytes()),
}


@pytest.mark.parametrize("how", BROKEN)
def test_malformed_tensor_is_refused(how: str) -> None:
    """Whatever is wrong with a tensor, the error is TENSOR_INVALID and names the field."""
    message = good()
    BROKEN[how](message)

    with pytest.raises(InvalidRequest, match=r"state\[0\]") as caught:
        codec.decode_tensor(message, field="state[0]")
    assert caught.value.reason is Reason.TENSOR_INVALID
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("scale", [[], [1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_malformed_scales_are_refused(scale: list[float]) -> None:
    """int8 needs one finite scale of 0 or more for each index of the first axis."""
    message = codec.encode_tensor(np.ones((2, 3), dtype=np.float32), codec.INT8)
    del message.scale[:]
    message.scale.extend(scale)

    with pytest.raises(InvalidRequest):
        codec.decode_tensor(message)


def test_a_byte_of_minus_128_is_refused() -> None:
    """int8 values are symmetric; -128 is no value."""
    message = codec.encode_tensor(np.ones((2, 3), dtype=np.float32), codec.INT8)
    message.data = b"\x80" + message.data[1:]

    with pytest.raises(InvalidRequest, match="-128"):
        codec.decode_tensor(message)


def test_expected_shape_is_named() -> None:
    """A tensor of the wrong shape is refused with both shapes."""
    with pytest.raises(InvalidRequest, match=r"\[2, 3\]; it must be \[4, 16, 16\]"):
        codec.decode_tensor(good(), shape=(4, 16, 16))


def test_nothing_infinite_is_sent() -> None:
    """A NaN of ours is an error here, not at the other end."""
    with pytest.raises(InvalidRequest):
        codec.encode_tensor(np.array([np.nan], dtype=np.float32), codec.FLOAT16)


def test_digest_names_content_encoding_and_shape() -> None:
    """Another encoding, shape or value is another digest; the same content is the same."""
    arrays = [np.ones((2, 3), dtype=np.float32), np.ones((3, 2), dtype=np.float32), np.zeros((2, 3), dtype=np.float32)]
    digests = {codec.tensor_digest(codec.encode_tensor(a, e)) for a in arrays for e in codec.ENCODINGS.values()}

    assert len(digests) == 12
    assert codec.tensor_digest(good()) in digests


def two_state_plan() -> Plan:
    first = PlanRow(
        timestep=900.5, step=0, unet_input=(1.0,), transition=((0.5,), (1.0,)), output=(0.5, -1.0), noise=(0.1, 0.0),
        x0_state=(2.0,), x0_output=-1.0,
    )  # fmt: skip
    last = PlanRow(
        timestep=1.0, step=1, unet_input=(1.0, 0.0), transition=((0.5, 0.25),), output=(0.5,), noise=(0.0,),
        x0_state=(2.0, 0.0), x0_output=-1.0,
    )  # fmt: skip
    return Plan(scheduler="test", num_inference_steps=2, init_noise_sigma=14.6, rows=(first, last))


def test_plan_round_trip() -> None:
    """A plan comes back equal, with the same digest, whether or not a row draws noise."""
    plan = two_state_plan()
    again = codec.decode_plan(codec.encode_plan(plan))

    assert plan == again
    assert plan.digest() == again.digest()


BROKEN_PLANS = {
    "long name": lambda m: setattr(m, "scheduler", "x" * 65),
    "no rows": lambda m: m.ClearField("rows"),
    "0 steps": lambda m: setattr(m, "num_inference_steps", 0),
    "1001 steps": lambda m: setattr(m, "num_inference_steps", 1001),
    "sigma 0": lambda m: setattr(m, "init_noise_sigma", 0.0),
    "sigma nan": lambda m: setattr(m, "init_noise_sigma", float("nan")),
    "wrong transition": lambda m: m.rows[0].transition.append(1.0),
    "no input": lambda m: m.rows[0].ClearField("unet_input"),
    "nan": lambda m: m.rows[0].output.__setitem__(0, float("nan")),
    "step goes back": lambda m: setattr(m.rows[1], "step", -1),
    "step jumps": lambda m: setattr(m.rows[1], "step", 3),
    "timestep": lambda m: setattr(m.rows[0], "timestep", 1000.5),
    "arrays do not chain": lambda m: m.rows.reverse(),
    "too many arrays": lambda m: m.rows[0].output.extend([0.0] * 8) or m.rows[0].transition.extend([0.0] * 8),
    "ends with two": lambda m: m.rows.pop(),
}


@pytest.mark.parametrize("how", BROKEN_PLANS)
def test_malformed_plan_is_refused(how: str) -> None:
    """Whatever is wrong with a plan, the error is PLAN_INVALID."""
    message: plan_pb2.Plan = codec.encode_plan(two_state_plan())
    BROKEN_PLANS[how](message)

    with pytest.raises(InvalidRequest) as caught:
        codec.decode_plan(message)
    assert caught.value.reason is Reason.PLAN_INVALID
