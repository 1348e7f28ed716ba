"""What a new prompt's embeddings take, and how alike two ends encode it: `python -m tests.benchmarks.bench_texts`.

Bytes: the demo family's text encoder, and one of CLIP-L's shape with random weights; those of the real one have a few
features of large values, so that its int8 deflates further. Likeness: how far an encoder of another precision is from
torch in float32, by all values and by the sample that a cloud sends; beside it another text, and other weights. Last,
the time of the digest. Writes nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from deploy.run_demo import DEMO
from hybridsd import codec, text_identity
from tests.benchmarks.common import machine, say
from training.export.graphs import text_encoder_graph
from training.export.onnx_export import export_graph
from training.export.text_identity import bundle_text_digest

TEXTS = (
    "",
    "a fox to the left of a donut on a yellow background",
    "a small red apple at the top left, a large car at the bottom right, on a white background",
)
OTHER = "a fox to the left of a donut on a blue background"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def clip_l(*, seed: int = 0, layers: int = 12) -> CLIPTextModel:
    """Returns a text encoder of CLIP-L's shape with random weights: 123M parameters, 77 tokens of 768 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=layers,
                num_attention_heads=12, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407,
                pad_token_id=49407,
            )
        ).eval()  # fmt: skip


def encode(network: CLIPTextModel, ids: np.ndarray) -> np.ndarray:
    """Returns embeddings, `[T, D]`, float32."""
    with torch.inference_mode():
        return network(torch.from_numpy(ids)).last_hidden_state[0].float().numpy()


def of_precisions(network: CLIPTextModel, folder: Path, ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the embeddings of a network by what else may run it. Its weights are of float32."""
    for name, dtype in DTYPES.items():
        yield f"torch, {name}", encode(copy_as(network, dtype), ids)
    yield "torch, weights of fp16", encode(copy_as(copy_as(network, torch.float16), torch.float32), ids)
    paths = {"fp32": folder / "fp32.onnx", "half-storage": folder / "half.onnx", "int8, dynamic": folder / "int8.onnx"}
    export_graph(text_encoder_graph(network), paths["fp32"], precision="fp32")
    export_graph(text_encoder_graph(network), paths["half-storage"], precision="half-storage")
    quantize_dynamic(
        paths["fp32"], paths["int8, dynamic"], weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
    )
    for name, path in paths.items():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        yield f"ONNX Runtime, {name}", session.run(["last_hidden_state"], {"input_ids": ids})[0][0]


def copy_as(network: CLIPTextModel, dtype: torch.dtype) -> CLIPTextModel:
    """Returns a copy of a network in another precision."""
    copy = CLIPTextModel(network.config)
    copy.load_state_dict(network.state_dict())
    return copy.to(dtype).eval()


def say_bytes(name: str, embeds: np.ndarray) -> None:
    """Prints the bytes of one text's embeddings by codec, and of a sample."""
    sizes = {each: codec.encode_tensor(embeds, encoding).ByteSize() for each, encoding in codec.ENCODINGS.items()}
    own = 4 * text_identity.SAMPLES
    say(f"| {name} | " + " | ".join(f"{sizes[each]:,}" for each in ("fp16", "int8", "int8z")) + f" | {own} |")


def say_likeness(name: str, network: CLIPTextModel, ids: np.ndarray, other_ids: np.ndarray, folder: Path) -> None:
    """Prints how far other precisions, another text and other weights are, by all values and by the sample."""
    reference = encode(network, ids)
    sample = text_identity.sample(reference, None)
    rows = [*of_precisions(network, folder, ids), ("another text", encode(network, other_ids))]
    jittered = copy_as(network, torch.float32)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weights in jittered.parameters():
            weights += 0.1 * weights.std(correction=0) * torch.randn_like(weights)
    rows.append(("weights with 10 % of noise", encode(jittered, ids)))
    for what, embeds in rows:
        error = float(np.linalg.norm(embeds - reference) / np.linalg.norm(reference))
        say(f"| {name} | {what} | {error:.1e} | {text_identity.distance(sample, embeds, None):.1e} |")


def bench_texts(*, smoke: bool = False) -> None:
    """Prints Markdown tables; `smoke` only tries whether it runs."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "large" / "tokenizer")
    demo = CLIPTextModel.from_pretrained(DEMO / "large" / "text_encoder", dtype=torch.float32).eval()
    length = int(demo.config.max_position_embeddings)

    def ids_of(text: str) -> np.ndarray:
        found = tokenizer(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
        return np.array([found], dtype=np.int64)

    large = clip_l(layers=1 if smoke else 12)
    drawn = np.full((2, 77), 49407, dtype=np.int64)
    drawn[:, 0] = 49406
    drawn[:, 1:13] = np.random.default_rng(0).integers(0, 49000, size=(2, 12))
    say(
        "\n| embeddings of one text | fp16 | int8 | int8z | own encoder (the sample) |\n| --- | --- | --- | --- | --- |"
    )
    for text in TEXTS:
        say_bytes(f"demo, {len(tokenizer(text)['input_ids']) - 2} tokens", encode(demo, ids_of(text)))
    embeds = encode(large, drawn[:1])
    say_bytes("CLIP-L's shape, 12 tokens", embeds)
    embeds[:, [133, 725]] = -28.0, 33.0  # about what the real one has there
    say_bytes("the same, two features of -28 and 33", embeds)
    say("\n| encoder | against torch in float32 | all values | the sample |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        say_likeness("demo", demo, ids_of(TEXTS[1]), ids_of(OTHER), Path(folder))
        if not smoke:
            say_likeness("CLIP-L's shape", large, drawn[:1], drawn[1:], Path(folder))
    started_s = time.perf_counter()
    bundle_text_digest(large, DEMO / "edge" / "tokenizer.json")
    parameters = sum(weights.numel() for weights in large.parameters())
    say(f"\ndigest of {parameters:,} parameters: {time.perf_counter() - started_s:.2f} s; may differ by "
        f"{text_identity.TOLERANCE:g}")  # fmt: skip


def main() -> None:
    """Prints the machine and the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: does it run?")
    options = parser.parse_args()
    say(f"machine: {machine()}")
    bench_texts(smoke=options.smoke)


if __name__ == "__main__":
    main()
