"""all-MiniLM-L6-v2 as GGUF files by the gguf package: an embedding model, and a reranker with a made-up head."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from chorus.core.fleet.records import Artifact, Tier
from chorus.engine.llama import ModelSource
from tests.engine import bert
from tests.engine.bert import LAYERS, SIZE, Array

_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_CONTROL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")


def minilm(cache: pytest.Cache) -> ModelSource:
    """The embedding model, made once and kept in pytest's cache."""
    return _source(cache, "all-MiniLM-L6-v2.F16.gguf", "all-minilm-l6-v2", "embedding", ranks=False)


def reranker(cache: pytest.Cache) -> ModelSource:
    """A cross-encoder whose scores mean nothing: its head is `head()`."""
    return _source(cache, "MiniLM-reranker.F16.gguf", "minilm-reranker", "rerank", ranks=True)


def head() -> dict[str, Array]:
    """A head of BERT's kind for one score: a dense layer, tanh, a projection. Random, and the same every time."""
    rng = np.random.default_rng(7)
    scale = 1.0 / np.sqrt(SIZE)
    return {
        "cls.weight": rng.normal(0.0, scale, (SIZE, SIZE)).astype(np.float32),
        "cls.bias": rng.normal(0.0, 0.1, SIZE).astype(np.float32),
        "cls.output.weight": rng.normal(0.0, 4.0 * scale, (1, SIZE)).astype(np.float32),
        "cls.output.bias": rng.normal(0.0, 0.1, 1).astype(np.float32),
    }


def score(ids: list[int]) -> float:
    """What the reranker says of tokens, by numpy."""
    w = head()
    pooled = np.tanh(bert.hidden(ids)[0] @ w["cls.weight"].T + w["cls.bias"])
    return float((w["cls.output.weight"] @ pooled + w["cls.output.bias"])[0])


def _source(cache: pytest.Cache, name: str, family: str, tag: str, *, ranks: bool) -> ModelSource:
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path = cache.mkdir(f"chorus-models-{made_by}") / name
    if not path.exists():
        part = path.with_suffix(".part")
        _write(part, name, ranks=ranks)
        part.replace(path)
    artifact = Artifact(
        family=family,
        name=name,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        size_bytes=path.stat().st_size,
        quantization="F16",
        parameter_count=22_700_000,
        context_length=512,
        architecture="bert",
        tier=Tier.MICRO,
        tags=(tag,),
    )
    return ModelSource(artifact, path)


def _write(path: Path, name: str, *, ranks: bool) -> None:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(name)
    writer.add_license("mit")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    writer.add_context_length(512)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(4 * SIZE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(bert.HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK if ranks else gguf.PoolingType.MEAN)
    _write_vocabulary(writer)
    tensors = {_name(name): tensor for name, tensor in bert.weights().items() if not name.startswith("pooler.")}
    for name, tensor in (tensors | head() if ranks else tensors).items():
        # as converters do: matrices that are multiplied with are halved, what is added is not
        halved = tensor.ndim == 2 and name not in ("position_embd.weight", "token_types.weight")
        writer.add_tensor(name, tensor.astype(np.float16) if halved else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = bert.vocabulary()
    kinds = []
    for token in tokens:
        kind = gguf.TokenType.CONTROL if token in _CONTROL else gguf.TokenType.NORMAL
        kind = gguf.TokenType.UNKNOWN if token == "[UNK]" else kind
        kinds.append(gguf.TokenType.UNUSED if token.startswith("[unused") else kind)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(2)
    writer.add_token_list([_phantom(token, kind) for token, kind in zip(tokens, kinds, strict=True)])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_unk_token_id(tokens.index("[UNK]"))
    writer.add_sep_token_id(tokens.index("[SEP]"))
    writer.add_pad_token_id(tokens.index("[PAD]"))
    writer.add_bos_token_id(tokens.index("[CLS]"))
    writer.add_mask_token_id(tokens.index("[MASK]"))


def _phantom(token: str, kind: gguf.TokenType) -> str:
    """llama.cpp marks where words begin; WordPiece marks where they go on."""
    if kind in (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN):
        return token
    return token[2:] if token.startswith("##") else f"▁{token}"


def _name(name: str) -> str:
    """The name that GGUF gives a tensor of the original."""
    parts = name.split(".")
    end = parts[-1]
    if parts[0] == "encoder":
        return f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:-1])]}.{end}"
    names = {
        "word_embeddings": "token_embd",
        "position_embeddings": "position_embd",
        "token_type_embeddings": "token_types",
        "LayerNorm": "token_embd_norm",
    }
    return f"{names[parts[1]]}.{end}"
