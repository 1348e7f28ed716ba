"""Arrays and plans to messages and back. The one place that knows the byte layout.

Knows nothing of the network. Everything is checked before a byte of payload is read.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridsd.closed_loop import Residual
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_CALLS
from hybridsd.plan import MAX_ARRAYS, Plan, PlanRow
from hybridsd.v1 import denoising_service_pb2, plan_pb2, tensor_pb2

FLOAT32 = tensor_pb2.ENCODING_FLOAT32
FLOAT16 = tensor_pb2.ENCODING_FLOAT16
INT8 = tensor_pb2.ENCODING_INT8
INT8_DEFLATE = tensor_pb2.ENCODING_INT8_DEFLATE

ENCODINGS: dict[str, tensor_pb2.Encoding.ValueType] = {
    "fp32": FLOAT32, "fp16": FLOAT16, "int8": INT8, "int8z": INT8_DEFLATE,
}  # fmt: skip
"""Encodings by the names that people use."""
RESIDUAL = "residual"
"""The name of states that are sent as residuals (`hybridsd.closed_loop`)."""
INT8_PSNR = 66.0
"""What int8 can be trusted with."""
CODECS = (RESIDUAL, *ENCODINGS)
"""How states can travel, by the names that people use."""
SIMPLER = {"int8z": "int8"}
"""What to ask a server for that does not know an encoding."""
VALUE_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int8z": 1}
"""Of a value, by the same names; of one that is compressed at most."""

MAX_VALUES = 2**22
MAX_MAGNITUDE = 65504.0
"""What float16 holds. Latents and embeddings are near 1; whatever is larger would overflow on the way."""
_MAX_AXIS = 65536
_DTYPES: dict[int, np.dtype[Any]] = {FLOAT32: np.dtype("<f4"), FLOAT16: np.dtype("<f2"), INT8: np.dtype("i1")}
_DTYPES[INT8_DEFLATE] = _DTYPES[INT8]
_INT8 = (INT8, INT8_DEFLATE)
_PLAIN, _DIFFERENCES = 0, 1
"""The first byte of what is deflated: the rest as it is, or each row less the one before, modulo 256."""
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
"""What compresses noise best, and what repeats (chunks of padding) best."""


def encode_tensor(array: NDArray[np.float32], encoding: tensor_pb2.Encoding.ValueType) -> tensor_pb2.Tensor:
    """Returns a float array as a message.

    Args:
        array: 1 to 4 axes, finite, of magnitude up to 65504 to be accepted. With INT8 each index of the first axis has
            a scale of its own: largest magnitude / 127.
        encoding: FLOAT32 (exact), FLOAT16 (saturates at 65504), INT8, or INT8_DEFLATE (the same values, smaller).

    Raises:
        InvalidRequest: TENSOR_INVALID if a value is not finite.
    """
    if not np.isfinite(array).all():
        raise Reason.TENSOR_INVALID.error("a tensor to send has values that are not finite")
    message = tensor_pb2.Tensor(encoding=encoding, shape=array.shape)
    if encoding in _INT8:
        rows = array.reshape(array.shape[0], -1).astype(np.float32)
        scale = np.abs(rows).max(axis=1) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))
        message.scale.extend(scale.tolist())
        values = np.clip(np.rint(rows / safe[:, None]), -127, 127).astype(np.int8)
        message.data = values.tobytes() if encoding == INT8 else _deflate(values)
    elif encoding == FLOAT16:
        message.data = np.clip(array, -65504, 65504).astype("<f2").tobytes()
    else:
        message.data = array.astype("<f4").tobytes()
    return message


def decode_tensor(
    message: tensor_pb2.Tensor, *, shape: Sequence[int] | None = None, field: str = "tensor"
) -> NDArray[np.float32]:
    """Returns a message as a float32 array.

    Args:
        message: The message; nothing about it is trusted.
        shape: The shape that it must have; None for any.
        field: What to call it in an error.

    Raises:
        InvalidRequest: TENSOR_INVALID, naming the field, what it has and what it should have.
    """

    def refuse(what: str) -> HybridSDError:
        return Reason.TENSOR_INVALID.error(f"{field}: {what}", field=field)

    dtype = _DTYPES.get(message.encoding)
    if dtype is None:
        raise refuse(f"encoding {message.encoding} is unknown; use {', '.join(ENCODINGS)}")
    if not 1 <= len(message.shape) <= 4:
        raise refuse(f"it has {len(message.shape)} axes; give 1 to 4")
    actual = tuple(message.shape)
    if not all(1 <= axis <= _MAX_AXIS for axis in actual):
        raise refuse(f"shape {list(actual)} is wrong; give axes of 1 to {_MAX_AXIS}")
    if shape is not None and actual != tuple(shape):
        raise refuse(f"shape is {list(actual)}; it must be {list(shape)}")
    size = math.prod(actual)
    if size > MAX_VALUES:
        raise refuse(f"shape {list(actual)} holds {size} values; at most {MAX_VALUES} are allowed")
    data = message.data
    if message.encoding == INT8_DEFLATE:
        inflated = _inflate(data, actual[0], size)
        if inflated is None:
            raise refuse(
                f"its data is no raw DEFLATE stream of 0 or 1 and {size} bytes, which shape {list(actual)} takes"
            )
        data = inflated
    if len(data) != size * dtype.itemsize:
        raise refuse(f"{len(data)} bytes for shape {list(actual)}; it must be {size * dtype.itemsize}")
    expected_scales = actual[0] if message.encoding in _INT8 else 0
    if len(message.scale) != expected_scales:
        raise refuse(f"{len(message.scale)} scales; there must be {expected_scales}")
    values: NDArray[np.float32] = np.frombuffer(data, dtype=dtype).reshape(actual).astype(np.float32)
    if expected_scales:
        if values.min() < -127:
            raise refuse("a byte is -128; int8 values are in [-127, 127]")
        scale = np.asarray(message.scale, dtype=np.float32)
        if not (scale >= 0).all():
            raise refuse("a scale is negative or not a number")
        with np.errstate(over="ignore"):  # what overflows is too large below
            values *= scale.reshape(-1, *(1,) * (len(actual) - 1))
    if not (np.abs(values) <= MAX_MAGNITUDE).all():  # false for NaN
        raise refuse(f"some values are NaN, or larger than {MAX_MAGNITUDE:g}")
    return values


def tensors_with(name: str, psnr: float) -> str:
    """Returns how tensors are encoded, of `ENCODINGS`, with a name of `CODECS`.

    Args:
        name: The codec.
        psnr: Beside residuals of so many dB tensors are as true as that.
    """
    if name != RESIDUAL:
        return name
    return "int8z" if psnr <= INT8_PSNR else "fp16"


def num_bytes(num_values: int, encoding: tensor_pb2.Encoding.ValueType) -> int:
    """Returns the most that the payload of a tensor of so many values takes."""
    return num_values * _DTYPES[encoding].itemsize


def encode_residual(residual: Residual) -> denoising_service_pb2.Residual:
    """Returns a residual as a message."""
    return denoising_service_pb2.Residual(call=residual.call, step=residual.step, data=residual.data)


def decode_residual(message: denoising_service_pb2.Residual) -> Residual:
    """Returns a message as a residual, which `hybridsd.closed_loop.follow` checks."""
    return Residual(message.call, message.step, message.data)


def decode_residuals(messages: Sequence[denoising_service_pb2.Residual], num_calls: int) -> tuple[Residual, ...]:
    """Returns messages as residuals over so many calls, which `hybridsd.closed_loop.follow` checks.

    Raises:
        InvalidRequest: TENSOR_INVALID if they are more than calls; a message has room for millions.
    """
    if len(messages) > max(num_calls, 0):
        raise Reason.TENSOR_INVALID.error(
            f"residuals: there are {len(messages)} for {num_calls} calls; give at most one for each", field="residuals"
        )
    return tuple(map(decode_residual, messages))


def _deflate(rows: NDArray[np.int8]) -> bytes:
    """Returns the smallest raw DEFLATE stream (RFC 1951) that we know to make of rows, `[n, m]`."""
    differences = rows.copy()
    differences[1:] -= rows[:-1]  # modulo 256
    streams = []
    for kind, values in ((_PLAIN, rows), (_DIFFERENCES, differences)):
        for strategy in _STRATEGIES:
            packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            streams.append(packer.compress(bytes([kind]) + values.tobytes()) + packer.flush())
    return min(streams, key=len)


def _inflate(data: bytes, num_rows: int, size: int) -> bytes | None:
    """Returns the bytes of `num_rows` rows, `size` in all; None if the stream is none, or holds anything else."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = unpacker.decompress(data, size + 2)  # one more than there may be tells that there is more
    except zlib.error:
        return None
    if not unpacker.eof or unpacker.unused_data or len(found) != size + 1 or found[0] not in (_PLAIN, _DIFFERENCES):
        return None
    if found[0] == _PLAIN:
        return found[1:]
    differences = np.frombuffer(found, dtype=np.int8, offset=1).reshape(num_rows, -1)
    return np.cumsum(differences, axis=0, dtype=np.int8).tobytes()  # modulo 256


def tensor_digest(message: tensor_pb2.Tensor) -> bytes:
    """Returns the SHA-256 of an encoded tensor (docs/protocol.md, "Digests"): its name in a content-addressed cache."""
    header = struct.pack(f"<ii{len(message.shape)}i", message.encoding, len(message.shape), *message.shape)
    scales = struct.pack(f"<{len(message.scale)}f", *message.scale)
    return hashlib.sha256(b"hybridsd.tensor.v1" + header + scales + message.data).digest()


def conditioning_digest(embeds: tensor_pb2.Tensor, pooled: tensor_pb2.Tensor | None) -> bytes:
    """Returns the digest of embeddings (docs/protocol.md, "Digests"): with pooled ones, that of both digests."""
    digest = tensor_digest(embeds)
    return digest if pooled is None else hashlib.sha256(digest + tensor_digest(pooled)).digest()


def encode_plan(plan: Plan) -> plan_pb2.Plan:
    """Returns a plan as a message."""
    rows = [
        plan_pb2.PlanRow(
            timestep=row.timestep,
            step=row.step,
            unet_input=row.unet_input,
            transition=[value for weights in row.transition for value in weights],
            output=row.output,
            noise=row.noise if row.draws_noise else (),
            x0_state=row.x0_state,
            x0_output=row.x0_output,
        )
        for row in plan.rows
    ]
    return plan_pb2.Plan(
        scheduler=plan.scheduler[:64],
        num_inference_steps=plan.num_inference_steps,
        init_noise_sigma=plan.init_noise_sigma,
        rows=rows,
    )


def decode_plan(message: plan_pb2.Plan) -> Plan:
    """Returns a message as a plan; nothing about it is trusted.

    Raises:
        InvalidRequest: PLAN_INVALID, naming the row.
    """
    if len(message.rows) > MAX_CALLS:  # before anything is built of them
        raise Reason.PLAN_INVALID.error(
            f"the plan has {len(message.rows)} rows; at most {MAX_CALLS} are allowed", field="plan"
        )
    rows = []
    for index, row in enumerate(message.rows):
        n, m = len(row.unet_input), len(row.output)
        if not (1 <= n <= MAX_ARRAYS and 1 <= m <= MAX_ARRAYS):
            raise Reason.PLAN_INVALID.error(
                f"plan row {index}: {n} arrays arrive and {m} leave; there must be 1 to {MAX_ARRAYS}", field="plan"
            )
        if len(row.transition) != n * m or len(row.x0_state) != n or len(row.noise) not in (0, m):
            raise Reason.PLAN_INVALID.error(
                f"plan row {index}: transition, x0_state and noise have {len(row.transition)}, {len(row.x0_state)} and"
                f" {len(row.noise)} values; they must have {m} x {n}, {n}, and {m} or none",
                field="plan",
            )
        rows.append(
            PlanRow(
                timestep=row.timestep,
                step=row.step,
                unet_input=tuple(row.unet_input),
                transition=tuple(tuple(row.transition[i * n : (i + 1) * n]) for i in range(m)),
                output=tuple(row.output),
                noise=tuple(row.noise) or (0.0,) * m,
                x0_state=tuple(row.x0_state),
                x0_output=row.x0_output,
            )
        )
    return Plan(
        scheduler=message.scheduler,
        num_inference_steps=message.num_inference_steps,
        init_noise_sigma=message.init_noise_sigma,
        rows=tuple(rows),
    )
