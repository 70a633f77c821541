"""What a GGUF file tells of the model in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gguf.constants import LlamaFileType, PoolingType
from jinja2 import TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from chorus.core.errors import ModelFileError
from chorus.core.fleet.records import Artifact, Tier
from chorus.models.gguf_reader import GgufHead, TensorInfo, read_head
from chorus.models.naming import family_of_file, stem_of
from chorus.models.soundness import check_numbers

_MODEL_KIND = "model"
_ENCODERS = frozenset(
    {"bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert"}
)
_MAX_CONTEXT = (1 << 31) - 1
_MAX_TEMPLATE_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """A model file. Counts and lengths are 0 where the file doesn't tell; token ids are None then."""

    path: Path
    size_bytes: int
    architecture: str
    name: str
    family: str  # read from the file's name
    parameter_count: int
    context_length: int
    quantization: str
    tokenizer: str
    bos_token_id: int | None
    eos_token_id: int | None
    vocabulary_size: int
    chat_template: str | None
    supports_tools: bool
    embedding_length: int
    feed_forward_length: int
    layer_count: int
    head_count: int
    kv_head_counts: tuple[int, ...]  # one per layer
    key_length: int
    value_length: int
    sliding_window: int
    causal: bool
    pooling: bool  # made for embeddings, or for scores
    ranking: bool  # made for scores: a reranker
    tensor_bytes: int
    input_bytes: int  # of them: the token embeddings
    output_bytes: int  # of them: the matrix of the logits; 0 where the embeddings are used for it
    split_count: int
    license: str
    tags: tuple[str, ...]  # those of the file's maker
    tensor_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)  # by name, as in the file

    @property
    def tier(self) -> Tier:
        """The tier by the number of parameters."""
        return Tier.of_parameters(self.parameter_count)

    @property
    def capability_tags(self) -> tuple[str, ...]:
        """What the model is for, as far as the file tells: `chat`, `tools`, `reasoning`, `code`, `embedding`,
        `rerank`."""
        template = self.chat_template or ""
        told = {
            "chat": self.chat_template is not None and not self.pooling,
            "tools": self.supports_tools,
            "reasoning": "<think>" in template,
            "code": re.search(r"\b(code|coder|coding)\b", " ".join((self.name, self.family, *self.tags)).lower()),
            "embedding": self.pooling and not self.ranking,
            "rerank": self.ranking,
        }
        return tuple(tag for tag, true in told.items() if true)


def inspect(path: Path) -> GgufInfo:
    """Reads what the GGUF file at `path` tells of its model; takes milliseconds, whatever its size.

    Raises ModelFileError where the file is no sound GGUF model: not GGUF, damaged, truncated, without tensors, one part
    of several, or something else than a model, such as an adapter (then `metadata["kind"]` tells what it is).
    """
    head = read_head(path)
    try:
        size = path.stat().st_size
        return _info(path, size, head)
    except OSError as error:
        raise ModelFileError(
            f"{path} can't be read: {error.strerror or error}", metadata={"path": str(path)}
        ) from error
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}", metadata={**error.metadata, "path": str(path)}) from error


def artifact_of(
    info: GgufInfo,
    sha256: str,
    *,
    family: str | None = None,
    file_name: str | None = None,
    tags: tuple[str, ...] | None = None,
    license: str = "",
) -> Artifact:
    """The artifact that a file is. What isn't given comes from the file and its name."""
    return Artifact(
        family=family or info.family,
        name=stem_of(file_name or info.path.name),
        sha256=sha256,
        size_bytes=info.size_bytes,
        quantization=info.quantization,
        parameter_count=info.parameter_count,
        context_length=info.context_length,
        architecture=info.architecture,
        tier=info.tier,
        tags=info.capability_tags if tags is None else tags,
        license=license or info.license,
    )


def _info(path: Path, size_bytes: int, head: GgufHead) -> GgufInfo:
    kind = head.text("general.type") or _MODEL_KIND
    if kind != _MODEL_KIND:
        raise ModelFileError(
            f"this is no model but of type {kind[:40]!r}, which can't be run by itself", metadata={"kind": kind[:40]}
        )
    architecture = head.text("general.architecture")
    if not architecture:
        raise ModelFileError("the file names no architecture, so it is no model or damaged")
    if not head.tensors:
        raise ModelFileError("the file has no tensors; it is a vocabulary or damaged")
    split_count = head.integer("split.count") or 1
    if split_count > 1:
        raise ModelFileError(
            f"this is one of {split_count} parts; join them with llama.cpp's llama-gguf-split --merge, or take a file "
            "that is whole"
        )

    check_numbers(head, architecture)

    def number(key: str) -> int:
        return max(head.integer(f"{architecture}.{key}") or 0, 0)

    heads = max((0, *head.integers(f"{architecture}.attention.head_count")))
    embedding = number("embedding_length")
    layers = number("block_count")
    head_length = embedding // heads if heads else 0
    template, tools = _chat_template(head)
    experts = number("expert_used_count") * number("expert_feed_forward_length")
    causal = head.integer(f"{architecture}.attention.causal")
    is_encoder = architecture in _ENCODERS or causal == 0
    return GgufInfo(
        path=path,
        size_bytes=size_bytes,
        architecture=architecture,
        name=head.text("general.name") or stem_of(path.name),
        family=family_of_file(path.name),
        parameter_count=sum(tensor.element_count for tensor in head.tensors),
        context_length=min(number("context_length"), _MAX_CONTEXT),
        quantization=_quantization(head.integer("general.file_type"), head.tensors),
        tokenizer=head.text("tokenizer.ggml.model") or "",
        bos_token_id=head.integer("tokenizer.ggml.bos_token_id"),
        eos_token_id=head.integer("tokenizer.ggml.eos_token_id"),
        vocabulary_size=head.length("tokenizer.ggml.tokens") or number("vocab_size"),
        chat_template=template,
        supports_tools=tools,
        embedding_length=embedding,
        feed_forward_length=max(
            experts, *(max(value, 0) for value in (0, *head.integers(f"{architecture}.feed_forward_length")))
        ),
        layer_count=layers,
        head_count=heads,
        kv_head_counts=_per_layer(head.integers(f"{architecture}.attention.head_count_kv") or (heads,), layers),
        key_length=number("attention.key_length") or head_length,
        value_length=number("attention.value_length") or head_length,
        sliding_window=number("attention.sliding_window"),
        causal=not is_encoder,
        pooling=is_encoder or bool(head.integer(f"{architecture}.pooling_type")),
        ranking=head.integer(f"{architecture}.pooling_type") == PoolingType.RANK,
        tensor_bytes=sum(tensor.size_bytes for tensor in head.tensors),
        input_bytes=sum(tensor.size_bytes for tensor in head.tensors if tensor.name == "token_embd.weight"),
        output_bytes=sum(tensor.size_bytes for tensor in head.tensors if tensor.name == "output.weight"),
        split_count=split_count,
        license=head.text("general.license") or "",
        tags=head.texts("general.tags"),
        tensor_shapes={tensor.name: tensor.shape for tensor in head.tensors},
    )


def _per_layer(values: tuple[int, ...], layers: int) -> tuple[int, ...]:
    if layers > 65_536:
        raise ModelFileError(f"the file claims {layers} layers, so it is damaged")
    counts = tuple(max(value, 0) for value in values)
    return counts if len(counts) == layers else (max(counts),) * layers


def _quantization(file_type: int | None, tensors: tuple[TensorInfo, ...]) -> str:
    """The file's own word for it, or that of most of its bytes."""
    if file_type is not None and file_type != LlamaFileType.GUESSED:
        try:
            return str(LlamaFileType(file_type).name).removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            pass
    bytes_by_type: Counter[str] = Counter()
    for tensor in tensors:
        bytes_by_type[tensor.type_name] += tensor.size_bytes
    return bytes_by_type.most_common(1)[0][0]


def _chat_template(head: GgufHead) -> tuple[str | None, bool]:
    """The template for conversations, and whether it, or one beside it, makes use of tools."""
    template = head.text("tokenizer.chat_template")
    if head.text("tokenizer.chat_template.tool_use") is not None:
        return template or head.text("tokenizer.chat_template.tool_use"), True
    return template, template is not None and _uses_tools(template)


def _uses_tools(template: str) -> bool:
    if len(template) > _MAX_TEMPLATE_CHARACTERS:
        return False
    try:
        return "tools" in meta.find_undeclared_variables(SandboxedEnvironment().parse(template))
    except (TemplateError, RecursionError, ValueError):
        # Some templates use tags of other engines; whether they mention tools is still told by the word.
        return re.search(r"\btools\b", template) is not None
