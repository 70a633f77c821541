"""Small GGUF files, written by the gguf package as converters write large ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

CHAT_TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE


def write_model(
    path: Path,
    *,
    architecture: str = "llama",
    name: str = "Tiny Test",
    tokens: int = 16,
    template: str | None = CHAT_TEMPLATE,
    layers: int = 2,
    kv_heads: int | Sequence[int] = 2,
    file_type: int | None = int(gguf.LlamaFileType.MOSTLY_Q8_0),
    kind: str | None = None,
    split_count: int | None = None,
    tensors: bool = True,
    filler: int = 0,
) -> Path:
    """Writes a sound model of a few kilobytes, and `filler` bytes more, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_string("general.type", kind)
    writer.add_name(name)
    writer.add_license("mit")
    writer.add_tags(["tiny", "test"])
    if file_type is not None:
        writer.add_file_type(file_type)
    if split_count is not None:
        writer.add_uint16("split.count", split_count)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(layers)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    if tensors:
        writer.add_tensor("token_embd.weight", np.ones((tokens, 64), dtype=np.float16))
        for layer in range(layers):
            quantized = gguf.quants.quantize(np.ones((64, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{layer}.attn_q.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if filler:
            rng = np.random.default_rng(7)
            writer.add_tensor("filler", rng.integers(0, 127, filler, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_adapter(
    path: Path,
    *,
    architecture: str = "llama",
    kind: str | None = "adapter",
    method: str | None = "lora",
    alpha: object = 4.0,
    pairs: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = (
        ("blk.0.attn_q.weight", (4, 64), (64, 4)),
        ("blk.1.attn_q.weight", (4, 64), (64, 4)),
    ),
    scale: float = 0.5,
    seed: int = 7,
    base: str = "",
    extra: Sequence[tuple[str, tuple[int, ...]]] = (),
    dtype: type[np.generic] = np.float32,
) -> Path:
    """Writes a LoRA adapter; `pairs` are names with the shapes of A and B as numpy has them, the last axis first.

    A is drawn from `seed`, B as well and multiplied by `scale`: with 0 the adapter changes nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_string("general.type", kind)
    if method is not None:
        writer.add_string("adapter.type", method)
    if isinstance(alpha, float):
        writer.add_float32("adapter.lora.alpha", alpha)
    elif isinstance(alpha, str):
        writer.add_string("adapter.lora.alpha", alpha)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    for name, a, b in pairs:
        writer.add_tensor(f"{name}.lora_a", (rng.standard_normal(a) / max(a[-1], 1) ** 0.5).astype(dtype))
        writer.add_tensor(f"{name}.lora_b", (rng.standard_normal(b) * scale).astype(dtype))
    for name, shape in extra:
        writer.add_tensor(name, np.ones(shape, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
