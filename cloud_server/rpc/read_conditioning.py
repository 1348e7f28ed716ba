"""The texts of a `DenoiseRequest`, or the embeddings in their place, with every rule of their comments checked.

Knows the messages and the models' descriptions. Knows nothing of the engine or the network.
"""

from collections.abc import Sequence

from cloud_server.models.denoiser import Encoded
from cloud_server.models.load import ModelInfo
from hybridsd import codec
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_CHUNKS, MAX_PROMPT_CHARS
from hybridsd.prompting import TextOptions, parse_weights
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import tensor_pb2

MAX_MESSAGE_BYTES = 4_000_000
"""Of the arrays of one message: gRPC's default limit is 4 MiB, and what is above it the caller could not read."""


def text_options(text: pb.TextConditioning) -> TextOptions:
    """Returns how a text is to be read."""
    return TextOptions(
        long_prompt="chunk" if text.long_prompt == pb.LONG_PROMPT_CHUNK else "truncate",
        weighting=text.prompt_weighting,
    )


def value_bytes(encoding: tensor_pb2.Encoding.ValueType) -> int:
    """Returns the size of a number on the wire."""
    return {codec.FLOAT32: 4, codec.INT8: 1, codec.INT8_DEFLATE: 1}.get(encoding, 2)


def read_conditioning(
    request: pb.DenoiseRequest, models: Sequence[ModelInfo], *, is_guided: bool
) -> tuple[str | Encoded, str | Encoded | None]:
    """Returns what to draw, and what to draw away from: None where no model takes it.

    Args:
        request: The request.
        models: All that run in it; embeddings must fit each of them.
        is_guided: Whether one of them computes classifier-free guidance.

    Raises:
        HybridSDError: The documented reason, naming the field.
    """
    kind = request.WhichOneof("conditioning")
    embedded = next((info.id for info in models if info.guidance == "embedded"), None)
    if kind == "text":
        return _text(request.text, is_guided=is_guided, embedded=embedded)
    if kind == "embeddings":
        return _embeddings(request.embeddings, models, is_guided=is_guided, embedded=embedded)
    raise Reason.FIELD_INVALID.error("conditioning is not set; set text or embeddings", field="conditioning")


def _text(text: pb.TextConditioning, *, is_guided: bool, embedded: str | None) -> tuple[str, str | None]:
    for field, value in (("text.prompt", text.prompt), ("text.negative_prompt", text.negative_prompt)):
        if len(value) > MAX_PROMPT_CHARS:
            raise Reason.PROMPT_TOO_LONG.error(
                f"{field} has {len(value)} characters; use at most {MAX_PROMPT_CHARS}", field=field
            )
        if text.prompt_weighting:
            try:
                parse_weights(value)
            except HybridSDError as error:
                raise error.reason.error(error.message, field=field) from error
    if text.long_prompt not in (pb.LONG_PROMPT_UNSPECIFIED, pb.LONG_PROMPT_TRUNCATE, pb.LONG_PROMPT_CHUNK):
        raise Reason.FIELD_INVALID.error(
            f"text.long_prompt {text.long_prompt} is unknown; use truncate or chunk", field="text.long_prompt"
        )
    if not text.prompt.strip():
        raise Reason.PROMPT_EMPTY.error("text.prompt is empty; say what to draw", field="text.prompt")
    if text.negative_prompt and not is_guided:
        raise _guidance_missing("text.negative_prompt", embedded)
    return text.prompt, text.negative_prompt if is_guided else None


def _embeddings(
    embeddings: pb.EmbeddingConditioning, models: Sequence[ModelInfo], *, is_guided: bool, embedded: str | None
) -> tuple[Encoded, Encoded | None]:
    has_negative = embeddings.HasField("negative_prompt_embeds")
    for field in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        if embeddings.HasField(field) and not is_guided:
            raise _guidance_missing(f"embeddings.{field}", embedded)
    if is_guided and not has_negative:
        raise Reason.GUIDANCE_INVALID.error(
            "guidance needs embeddings.negative_prompt_embeds; send them, or set guidance_scale to 1",
            field="embeddings.negative_prompt_embeds",
        )
    info = models[0]
    for other in models:
        if (other.context_length, other.embed_dim, other.pooled_dim) != (
            info.context_length, info.embed_dim, info.pooled_dim,
        ):  # fmt: skip
            raise Reason.FIELD_INVALID.error(
                f"models {info.id} and {other.id} take embeddings of other shapes; send text", field="embeddings"
            )
    prompt = _one_embedding(embeddings, "", info)
    if not is_guided:
        return prompt, None
    negative = _one_embedding(embeddings, "negative_", info)
    if negative.embeds.shape != prompt.embeds.shape:
        raise Reason.TENSOR_INVALID.error(
            f"embeddings.negative_prompt_embeds is {list(negative.embeds.shape)}, prompt_embeds"
            f" {list(prompt.embeds.shape)}; send them in one length",
            field="embeddings.negative_prompt_embeds",
        )
    return prompt, negative


def _one_embedding(embeddings: pb.EmbeddingConditioning, prefix: str, info: ModelInfo) -> Encoded:
    name = f"{prefix}prompt_embeds"
    field, message = f"embeddings.{name}", getattr(embeddings, name)
    chunks = message.shape[0] // info.context_length if message.shape else 0
    chunks = min(max(chunks, 1), MAX_CHUNKS)
    embeds = codec.decode_tensor(message, shape=(chunks * info.context_length, info.embed_dim), field=field)
    pooled_name = f"{prefix}pooled_prompt_embeds"
    field = f"embeddings.{pooled_name}"
    if embeddings.HasField(pooled_name) != bool(info.pooled_dim):  # type: ignore[arg-type]
        raise Reason.FIELD_INVALID.error(
            f"model {info.id} takes {'' if info.pooled_dim else 'no '}{field}; "
            f"{'send it' if info.pooled_dim else 'leave it out'}",
            field=field,
        )
    if not info.pooled_dim:
        return Encoded(embeds)
    pooled = codec.decode_tensor(getattr(embeddings, pooled_name), shape=(info.pooled_dim,), field=field)
    return Encoded(embeds, pooled=pooled)


def sent_digest(embeddings: pb.EmbeddingConditioning, prefix: str) -> bytes:
    """Returns the digest of embeddings that the caller sent; the prefix is "" or "negative_"."""
    pooled = f"{prefix}pooled_prompt_embeds"
    has_pooled = embeddings.HasField(pooled)  # type: ignore[arg-type]
    return codec.conditioning_digest(
        getattr(embeddings, f"{prefix}prompt_embeds"), getattr(embeddings, pooled) if has_pooled else None
    )


def _guidance_missing(field: str, embedded: str | None) -> HybridSDError:
    if embedded is not None:
        return Reason.GUIDANCE_INVALID.error(
            f"model {embedded} is a consistency model, which has guidance as an input and no place for {field}; leave"
            " it out, or choose another model",
            field=field,
        )
    return Reason.GUIDANCE_INVALID.error(
        f"guidance_scale is 1, so {field} has no effect; leave it out, or raise guidance_scale", field=field
    )


def check_text_size(request: pb.DenoiseRequest, info: ModelInfo, *, num_texts: int) -> None:
    """Refuses a text whose embeddings, in as many chunks as there may be, need a message above `MAX_MESSAGE_BYTES`."""
    if request.text.long_prompt != pb.LONG_PROMPT_CHUNK:
        return
    values = MAX_CHUNKS * info.context_length * info.embed_dim + info.pooled_dim
    size_bytes = num_texts * values * value_bytes(request.encoding)
    if size_bytes > MAX_MESSAGE_BYTES:
        raise Reason.FIELD_INVALID.error(
            f"the embeddings of {MAX_CHUNKS} chunks take up to {size_bytes} bytes; at most {MAX_MESSAGE_BYTES} fit into"
            " a message: choose encoding fp16 or int8",
            field="encoding",
        )
