"""Gives a tiny bundle the text encoders of a tiny pipeline, as `export_bundle` would: both ends read texts alike."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hybridsd.manifest import Manifest, describe_file, read_manifest, write_manifest
from training.export.bundles import save_tokenizer
from training.export.onnx_export import export_graph
from training.export.sdxl_bundle import SecondText, text_graphs
from training.export.text_identity import bundle_text_digest


def share_texts(bundle: Path, pipeline: Path, precision: Literal["fp32", "half-storage", "fp16"] = "fp32") -> Manifest:
    """Replaces the text encoders of a bundle by those of a pipeline, and writes their digest; returns the manifest."""
    first = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval()
    length = int(first.config.max_position_embeddings)
    files: dict[str, str] = {}
    second = None
    for role in ("tokenizer", "tokenizer_2"):
        if (pipeline / role).is_dir():
            files[role] = f"{role}.json"
            (bundle / role).mkdir(exist_ok=True)
            made = save_tokenizer(CLIPTokenizer.from_pretrained(pipeline / role), bundle / role / "whole.json", length)
            made.replace(bundle / files[role])
    if "tokenizer_2" in files:
        encoder = CLIPTextModelWithProjection.from_pretrained(pipeline / "text_encoder_2", dtype=torch.float32).eval()
        second = SecondText(encoder=encoder, tokenizer_file=bundle / files["tokenizer_2"])
    for graph in text_graphs(first, second):
        files[graph.role] = f"{graph.role}.onnx"
        export_graph(graph, bundle / files[graph.role], precision=precision)
    files["text_encoder_digest"] = "text_encoder.sha256"
    digest = bundle_text_digest(first, bundle / "tokenizer.json", second, bundle / files.get("tokenizer_2", ""))
    (bundle / files["text_encoder_digest"]).write_text(digest + "\n")
    return rewrite(bundle, files)


def rewrite(bundle: Path, files: Mapping[str, str]) -> Manifest:
    """Describes files anew in the manifest of a bundle."""
    before = read_manifest(bundle)
    described = {role: describe_file(bundle, path) for role, path in files.items()}
    manifest = replace(before, files={**before.files, **described})
    write_manifest(manifest, bundle)
    return manifest
