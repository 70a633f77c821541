"""LoRA adapters as GGUF files: small changes to a model's weights, kept apart from them and applied by request.

For a weight W of the model (columns x rows), the file has `NAME.lora_a` (columns x rank) and `NAME.lora_b` (rank x
rows), and with the adapter the layer computes W x + alpha / rank * B (A x). (Hu et al., "LoRA: Low-Rank Adaptation of
Large Language Models", arXiv 2106.09685.)

llama.cpp checks little of this by itself and ends the process over the rest: a metadata field of another type, a rank
that differs between A and B of the embedding, a third dimension. So everything it would stumble on is checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chorus.core.errors import ModelFileError
from chorus.models.gguf import GgufInfo
from chorus.models.gguf_reader import GgufHead, TensorInfo, read_head
from chorus.models.naming import stem_of

ADAPTER_KIND = "adapter"
_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0"})  # those that converters write, and every backend multiplies by
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_PARTS = (".lora_a", ".lora_b")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors that change one weight: their shapes as in the file."""

    weight: str
    a: tuple[int, ...]
    b: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The inner dimension; of A and B of the embedding it is the first."""
        return self.b[0]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an adapter's file tells. `alpha` 0: the factors are applied as they are. `bases`: models that it names."""

    path: Path
    size_bytes: int
    name: str  # that requests use: the file's, without `.gguf`
    architecture: str
    alpha: float
    pairs: tuple[Pair, ...]
    bases: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of its pairs."""
        return max(pair.rank for pair in self.pairs)

    def names_base(self, *names: str) -> bool:
        """Whether the file says that it was made for a model of one of these names, however they are spelt."""
        return not {_plain(name) for name in self.bases}.isdisjoint(_plain(name) for name in names if name)


def read_adapter(path: Path) -> AdapterInfo:
    """Reads and checks an adapter's file by itself; whether it belongs to a model, `check_fit` tells.

    Takes milliseconds. Raises ModelFileError where the file is damaged, no LoRA adapter, or one of a kind that
    llama.cpp cannot apply.
    """
    head = read_head(path)
    try:
        return _info(path, head, path.stat().st_size)
    except OSError as error:
        raise ModelFileError(
            f"{path} can't be read: {error.strerror or error}", metadata={"path": str(path)}
        ) from error
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}", metadata={"path": str(path)}) from error


def check_fit(adapter: AdapterInfo, model: GgufInfo) -> None:
    """Raises ModelFileError, which says why, where the adapter does not belong to that model."""
    if adapter.architecture != model.architecture:
        raise ModelFileError(
            f"the adapter {adapter.name} is for models of architecture {adapter.architecture[:40]!r}; "
            f"{model.path.name} is of {model.architecture!r}"
        )
    for pair in adapter.pairs:
        shape = model.tensor_shapes.get(pair.weight)
        if shape is None:
            raise ModelFileError(
                f"the adapter {adapter.name} changes {pair.weight[:60]!r}, which {model.path.name} does not have; it "
                "was made for another model"
            )
        if len(shape) < 2:
            raise ModelFileError(
                f"the adapter {adapter.name} changes {pair.weight[:60]!r}, which is no matrix, so it can't be applied"
            )
        if pair.weight == _EMBEDDING and _OUTPUT not in model.tensor_shapes:
            raise ModelFileError(
                f"the adapter {adapter.name} changes the token embedding, which {model.path.name} also uses for its "
                "output; llama.cpp can't apply that, so make one without it"
            )
        if not _matches(pair, shape):
            raise ModelFileError(
                f"the adapter {adapter.name} changes {pair.weight[:60]!r} by {_shown(pair.a)} and {_shown(pair.b)}, "
                f"and in {model.path.name} it is {_shown(shape)}; it was made for another model"
            )


def belonging(adapter: AdapterInfo, models: Sequence[GgufInfo], families: Mapping[Path, str]) -> tuple[GgufInfo, ...]:
    """Those of `models` that the adapter is for: those that it fits, or of them only those that it names.

    `families` has a model's family by its path. Raises ModelFileError where it fits none, with what is wrong with the
    one that came closest.
    """
    fitting = []
    problem: ModelFileError | None = None
    for model in models:
        try:
            check_fit(adapter, model)
        except ModelFileError as error:
            if problem is None or model.architecture == adapter.architecture:
                problem = error
        else:
            fitting.append(model)
    if not fitting:
        raise problem or ModelFileError(
            f"the adapter {adapter.name} is for models of architecture {adapter.architecture[:40]!r}, and there is none"
        )
    named = [model for model in fitting if adapter.names_base(model.name, model.family, families.get(model.path, ""))]
    return tuple(named or fitting)


def _info(path: Path, head: GgufHead, size_bytes: int) -> AdapterInfo:
    kind = head.text("general.type")
    if kind != ADAPTER_KIND:
        raise ModelFileError(f"this is no adapter but of type {(kind or 'model')[:40]!r}")
    method = head.text("adapter.type")
    if method != "lora":
        raise ModelFileError(
            f"adapters of type {(method or 'none')[:40]!r} can't be applied, only those of type 'lora'"
        )
    architecture = head.text("general.architecture")
    if not architecture:
        raise ModelFileError("the adapter names no architecture, so it is damaged")
    if head.length("adapter.alora.invocation_tokens"):
        raise ModelFileError("this is an activated LoRA, which sets in within a prompt; only plain ones can be applied")
    alpha = head.real("adapter.lora.alpha") or 0.0
    if not math.isfinite(alpha):
        raise ModelFileError(f"its alpha is {alpha}, so the file is damaged")
    return AdapterInfo(
        path=path,
        size_bytes=size_bytes,
        name=stem_of(path.name),
        architecture=architecture,
        alpha=alpha,
        pairs=_pairs(head.tensors),
        bases=_bases(head),
    )


def _bases(head: GgufHead) -> tuple[str, ...]:
    """The names of the models that the adapter was made from, and the last part of where they are."""
    count = min(max(head.integer("general.base_model.count") or 0, 0), 16)
    found = []
    for number in range(count):
        prefix = f"general.base_model.{number}"
        url = head.text(f"{prefix}.repo_url") or ""
        found += [head.text(f"{prefix}.name") or "", url.rstrip("/").rpartition("/")[2]]
    return tuple(name for name in found if name)


def _pairs(tensors: Sequence[TensorInfo]) -> tuple[Pair, ...]:
    halves: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        name, part = tensor.name[:-7], tensor.name[-7:]
        if part not in _PARTS:
            if tensor.name.endswith(
                "_norm.weight"
            ):  # whole norms that some trainers add; llama.cpp leaves them out too
                continue
            raise ModelFileError(f"tensor {tensor.name[:60]!r} is no part of a LoRA adapter")
        if tensor.type_name not in _TYPES:
            raise ModelFileError(f"tensor {tensor.name[:60]!r} is stored as {tensor.type_name}, which no adapter is")
        if len(tensor.shape) < 2 or not all(tensor.shape):
            raise ModelFileError(
                f"tensor {tensor.name[:60]!r} has the shape {_shown(tensor.shape)}, which is no matrix"
            )
        halves.setdefault(name, {})[part] = tensor
    for name, found in halves.items():
        if len(found) != len(_PARTS):
            raise ModelFileError(f"of the two factors for {name[:60]!r} one is missing, so the file is damaged")
    if not halves:
        raise ModelFileError("the adapter changes nothing: it has no tensors")
    return tuple(Pair(name, found[".lora_a"].shape, found[".lora_b"].shape) for name, found in halves.items())


def _matches(pair: Pair, weight: tuple[int, ...]) -> bool:
    """Whether B A has the weight's shape. Those of the embedding are the other way around: a row of A is a token's."""
    a, b = _padded(pair.a), _padded(pair.b)
    columns, rows, *experts = _padded(weight)
    if a[2:] != tuple(experts) or b[2:] != tuple(experts):
        return False
    if pair.weight == _EMBEDDING:
        return b[1] == columns and a[1] == rows and a[0] == b[0]
    return a[0] == columns and b[1] == rows and a[1] == b[0]


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1, 1, 1)[:4]


def _plain(name: str) -> str:
    return _NOT_IN_NAMES.sub("", name.lower())


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
