"""Where Python meets llama.cpp: the library, weights and vocabulary.

`context` and `tokenizer` have the rest; nothing else calls C.

llama.cpp answers a wrong argument with an assertion that ends the process, so everything it would assert is checked
in these modules before the call, and raised as `EngineError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chorus.core.errors import ConfigError, DrainingError, EngineError
from chorus.engine.llama import log
from chorus.engine.llama.tokenizer import TOKEN_CONTROL, Tokenizer, keep_accents

if TYPE_CHECKING:
    from chorus.engine.llama.ggml import Offload

_POOLING_RANK = 4
_LARGEST_POSITION = (1 << 31) - 1
# How long OpenMP's threads spin for the next piece of work: some 0.1 ms, which is longer than between two operations.
# Its own 300,000 are some 5 ms, for which they keep the event loop and other processes off their cores after a step.
_SPINS = "8000"
_OPENMP_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@functools.cache
def library() -> Any:
    """llama_cpp's C functions, loaded on first use. Raises `ConfigError` where package or library is missing."""
    if not any(name in os.environ for name in _OPENMP_WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS  # read when the library is loaded
    try:
        functions = importlib.import_module("llama_cpp.llama_cpp")
    except ImportError as error:
        raise ConfigError(
            f"this machine cannot run models itself: llama-cpp-python is not installed ({error}); install it with "
            "pip install 'chorus-mesh[llama]', or point the runner at a server such as Ollama"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"llama-cpp-python is installed but its library does not load: {error}; it was probably built for another "
            "machine or driver, reinstall it with pip install --force-reinstall --no-cache-dir 'chorus-mesh[llama]'"
        ) from error
    log.attach(functions)
    functions.llama_backend_init()
    return functions


def logits_address(*, waits: bool) -> Callable[[int], int | None]:
    """`llama_get_logits`, which gives an address for a context's, or None where there are none.

    Where it `waits`, for a graphics device, it lets go of the interpreter lock meanwhile. Where it need not, it keeps
    the lock: another thread would take it, and the next step begin that much later.
    """
    library_ = library()._lib
    kind = ctypes.CDLL if waits else ctypes.PyDLL
    function: Any = kind(library_._name, handle=library_._handle).llama_get_logits
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    get: Callable[[int], int | None] = function
    return get


def version() -> str:
    """The version of llama.cpp's library."""
    return bytes(library().llama_version()).decode("ascii", "replace")


def build() -> str:
    """What decides how fast and how exactly it computes: the version of its Python package, and its backends."""
    return f"{importlib.metadata.version('llama-cpp-python')} {'+'.join(backends())}"


def backends() -> tuple[str, ...]:
    """The compute backends of this build, such as `("cpu", "cuda")`."""
    library()
    ggml = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    ggml.ggml_backend_reg_get.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_reg_name.restype = ctypes.c_char_p
    ggml.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    names = (ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)) for i in range(ggml.ggml_backend_reg_count()))
    return tuple(sorted({name.decode("ascii", "replace").lower() for name in names if name}))


def supports_gpu_offload() -> bool:
    """Whether this build can put layers on a graphics device that it sees."""
    return bool(library().llama_supports_gpu_offload())


def quantize(source: Path, target: Path, quantization: str, *, threads: int) -> None:
    """Writes `source` to `target` in another quantization, such as `Q8_0`; what is quantized already as well.

    Takes as long as reading, computing and writing the file takes, in this thread, and cannot be broken off. Raises
    `EngineError` with llama.cpp's own last words where it fails; what is at `target` is of no use then.
    """
    lib = library()
    file_type = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{quantization}", None)
    if file_type is None:
        raise EngineError(f"llama.cpp has no quantization {quantization!r}")
    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = threads
    params.allow_requantize = True
    with log.last_errors() as errors:
        failed = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        raise EngineError(f"{source.name} cannot be requantized to {quantization}: {'; '.join(errors) or 'no reason'}")


class Model:
    """Weights and vocabulary, or the vocabulary alone."""

    def __init__(
        self,
        path: Path,
        *,
        offload: Offload | None = None,
        lock_memory: bool = False,
        vocabulary_only: bool = False,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Loads a file; takes as long as that takes. `progress` gets 0..1 and returns False to break the load off.

        `offload` says what goes to graphics devices; without it they are left alone.
        Raises `EngineError` with llama.cpp's own last words when it refuses the file or was broken off.
        """
        self._lib = library()
        self._uses = 0  # of the vocabulary, by other threads than the owner's: closing waits for them
        self._unused = threading.Condition()
        self._adapters: set[Adapter] = set()
        self.adapters_lock = threading.Lock()
        params = self._lib.llama_model_default_params()
        params.vocab_only = vocabulary_only
        self._offload = offload  # C keeps pointers into it
        nowhere = (ctypes.c_void_p * 1)()
        if offload is not None:
            offload.fill(params)
        else:
            params.devices, params.n_gpu_layers = ctypes.cast(nowhere, ctypes.c_void_p), 0
        if lock_memory:
            params.load_mode = self._lib.LLAMA_LOAD_MODE_MMAP_MLOCK

        def report(fraction: float, _: object) -> bool:
            return progress is None or progress(fraction)

        overrides = keep_accents(self._lib)
        params.kv_overrides = overrides
        callback = self._lib.llama_progress_callback(report)
        params.progress_callback = callback
        with log.last_errors() as errors:
            self._handle: int | None = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise EngineError(f"llama.cpp cannot load {path.name}: {'; '.join(errors) or 'no reason given'}")
        try:
            self._read(path)
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path) -> None:
        """What the loaded file says of itself."""
        vocab = self._lib.llama_model_get_vocab(self._handle)
        if not vocab or not self._lib.llama_vocab_type(vocab):
            raise EngineError(f"{path.name} holds no vocabulary")
        self._vocab: int = vocab
        self.vocabulary_size = int(self._lib.llama_vocab_n_tokens(vocab))
        self.architecture = self.metadata("general.architecture") or ""
        self.trained_context = self._trained_context(path)
        self.embedding_size = int(self._lib.llama_model_n_embd_out(self._handle))
        self.class_count = int(self._lib.llama_model_n_cls_out(self._handle))
        declared = self.metadata(f"{self.architecture}.pooling_type") or ""
        self.pooling = int(declared) if declared in ("1", "2", "3", "4") else 0  # as llama.cpp counts; 0: none declared
        self.bos = int(self._lib.llama_vocab_bos(vocab))
        self.eos = int(self._lib.llama_vocab_eos(vocab))
        self.sep = int(self._lib.llama_vocab_sep(vocab))
        self.adds_sep = bool(self._lib.llama_vocab_get_add_sep(vocab)) and self.sep >= 0
        self.adds_bos = bool(self._lib.llama_vocab_get_add_bos(vocab)) and self.bos >= 0
        self._pieces: list[bytes | None] = [None] * self.vocabulary_size
        self.tokenizer = Tokenizer(self, self._lib, vocab)

    @property
    def handle(self) -> int:
        """The C pointer. Raises `DrainingError` once closed."""
        if not self._handle:
            raise DrainingError("the model has been unloaded")
        return self._handle

    @property
    def offloaded(self) -> bool:
        """Whether any of it may be on a graphics device."""
        return self._offload is not None and self._offload.layers != 0

    def close(self) -> None:
        """Frees weights and adapters; every context of this model must be closed before. May be called twice."""
        with self._unused:
            self._unused.wait_for(lambda: not self._uses)
            if self._handle:
                for adapter in list(self._adapters):
                    adapter.close()
                self._lib.llama_model_free(self._handle)
                self._handle = None

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, or None; arrays cannot be read."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = self._lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if needed < 0:
                return None
            if needed < size:
                return buffer.raw[:needed].decode("utf-8", "replace")
            size = needed + 1

    def _trained_context(self, path: Path) -> int:
        """In tokens; 0 where the file does not say. llama.cpp looks at it only where it reads weights, too."""
        key = f"{self.architecture}.context_length"
        text = self.metadata(key) or "0"
        if not (text.isascii() and text.isdecimal()):
            raise EngineError(f"{path.name} is damaged: its {key} is {text[:40]!r}, which is no number of tokens")
        return min(int(text[:20]), _LARGEST_POSITION)

    def chat_template(self, name: str | None = None) -> str | None:
        """The model's default chat template, or the one called `name`, where it has one."""
        template = self._lib.llama_model_chat_template(self.handle, name.encode() if name else None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def generates(self) -> bool:
        """Whether it is a decoder that goes on with text, rather than one that only embeds it."""
        lib, handle = self._lib, self.handle
        special = lib.llama_model_has_encoder(handle) or lib.llama_model_is_diffusion(handle)
        return self.causal and not self.pooling and not special and bool(lib.llama_model_has_decoder(handle))

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it; if not, a text must be read in one piece."""
        return self.metadata(f"{self.architecture}.attention.causal") != "false"

    @property
    def embeds(self) -> bool:
        """Whether vectors can be taken from it (not from rerankers and encoder-decoder models)."""
        return self.pooling != _POOLING_RANK and not self._lib.llama_model_has_encoder(self.handle)

    @property
    def ranks(self) -> bool:
        """Whether it scores a document for a query: a cross-encoder with a head for it."""
        return self.pooling == _POOLING_RANK and not self._lib.llama_model_has_encoder(self.handle)

    @property
    def copies_prefixes(self) -> bool:
        """Whether part of a sequence may be copied to another: not where memory is a state or a sliding window."""
        return not self.keeps_state and not self._lib.llama_model_n_swa(self.handle)

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return int(self._lib.llama_model_n_params(self.handle))

    @property
    def cell_share(self) -> float:
        """About what skipping one cell of somebody else's takes, as a share of the multiplications of a whole token.

        A cell that a token attends to takes 2 x layers x width multiplications; one that it may not see costs a
        quarter of that on a CPU (measured), since it still has to be looked at.
        """
        layers, width = self._lib.llama_model_n_layer(self.handle), self._lib.llama_model_n_embd(self.handle)
        return 0.25 * 2 * int(layers) * int(width) / max(self.parameters, 1)

    @property
    def keeps_state(self) -> bool:
        """Whether memory is a state of all tokens so far, from which the last ones cannot be taken back."""
        lib, handle = self._lib, self.handle
        return bool(lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle))

    # --- adapters ---------------------------------------------------------------------------------------------------

    def load_adapter(self, path: Path) -> Adapter:
        """Reads a LoRA adapter, which must have been checked (`chorus.models.adapters`), for contexts of this model.

        For any thread: the model cannot be freed meanwhile. llama.cpp keeps a list of a model's adapters, which a
        context reads when it plans its memory, so both are done under `adapters_lock`. Raises `EngineError`.
        """
        with self.in_use(), self.adapters_lock, log.last_errors() as errors:
            handle = self._lib.llama_adapter_lora_init(self.handle, str(path).encode())
            if not handle:
                raise EngineError(f"llama.cpp cannot load the adapter {path.name}: {'; '.join(errors) or 'no reason'}")
            adapter = Adapter(self, handle)
            self._adapters.add(adapter)
            return adapter

    # --- vocabulary -------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. `add_special` adds what the model wants around it, `parse_special` reads special tokens.

        Raises `UnicodeEncodeError` for half a surrogate pair, `EngineError` for text that is too large. Thread-safe
        while the model is open.
        """
        return self.tokenizer.ids(text, add_special=add_special, parse_special=parse_special)

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token as part of an answer; none for special tokens. The id must be in the vocabulary."""
        piece = self._pieces[token_id]
        if piece is None:
            piece = self._pieces[token_id] = self.piece_of(token_id, show_special=False)
        return piece

    def written(self, token_id: int) -> bytes:
        """The bytes of a token, special ones in writing. The id must be in the vocabulary."""
        return self.piece(token_id) or self.piece_of(token_id, show_special=True)

    def piece_of(self, token_id: int, *, show_special: bool) -> bytes:
        """The bytes of a token, special ones in writing if `show_special`."""
        self.check_ids((token_id,))
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self.in_use() as vocab:
                count = self._lib.llama_token_to_piece(vocab, token_id, buffer, size, 0, show_special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @property
    def vocabulary_type(self) -> int:
        """How texts become tokens, by llama.cpp's own numbers."""
        with self.in_use() as vocab:
            return int(self._lib.llama_vocab_type(vocab))

    def token_texts(self) -> Iterator[bytes]:
        """Every token as the vocabulary writes it, in order of their ids."""
        text = self._lib.llama_vocab_get_text
        with self.in_use() as vocab:
            for token_id in range(self.vocabulary_size):
                yield text(vocab, token_id) or b""

    def pieces(self) -> list[bytes]:
        """The bytes of every token as part of an answer. Takes a tenth of a second for 50,000 tokens."""
        size = 1024
        buffer = ctypes.create_string_buffer(size)
        to_piece = self._lib.llama_token_to_piece
        found: list[bytes] = []
        with self.in_use() as vocab:
            for token_id in range(self.vocabulary_size):
                count = to_piece(vocab, token_id, buffer, size, 0, False)
                found.append(bytes(memoryview(buffer)[:count]) if count > 0 else b"")  # none is too long in earnest
        return found

    def detokenize(self, token_ids: Sequence[int], *, show_special: bool) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD. Thread-safe while the model is open."""
        self.check_ids(token_ids)
        ids = (ctypes.c_int32 * len(token_ids))(*token_ids)
        room = 16 + 8 * len(token_ids)
        while True:
            buffer = ctypes.create_string_buffer(room)
            with self.in_use() as vocab:
                count = self._lib.llama_detokenize(vocab, ids, len(token_ids), buffer, room, False, show_special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def end_tokens(self) -> frozenset[int]:
        """The tokens with which the model ends its text."""
        is_end = self._lib.llama_vocab_is_eog
        with self.in_use() as vocab:
            return frozenset(token_id for token_id in range(self.vocabulary_size) if is_end(vocab, token_id))

    def control_texts(self) -> tuple[str, ...]:
        """The texts that `parse_special` reads as control tokens."""
        attributes = self._lib.llama_vocab_get_attr
        with self.in_use() as vocab:
            found = [number for number in range(self.vocabulary_size) if attributes(vocab, number) & TOKEN_CONTROL]
        texts = (self.piece_of(token_id, show_special=True).decode("utf-8", "replace") for token_id in found)
        return tuple(text for text in texts if text)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises `EngineError` unless every id is in the vocabulary."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocabulary_size:
                raise EngineError(f"token {token_id} is not in the vocabulary of {self.vocabulary_size}")

    @contextlib.contextmanager
    def in_use(self) -> Iterator[int]:
        """The vocabulary, which cannot be freed meanwhile."""
        with self._unused:
            _ = self.handle
            self._uses += 1
        try:
            yield self._vocab
        finally:
            with self._unused:
                self._uses -= 1
                self._unused.notify_all()


class Adapter:
    """A LoRA adapter in memory, of one model. A context that uses it must use another one before it is closed."""

    def __init__(self, model: Model, handle: Any) -> None:
        """Made by `Model.load_adapter`."""
        self.model = model
        self._handle: Any = handle

    @property
    def handle(self) -> Any:
        """The C pointer. Raises `EngineError` once closed."""
        if not self._handle:
            raise EngineError("the adapter has been unloaded")
        return self._handle

    def close(self) -> None:
        """Frees it. May be called twice, and after the model was closed."""
        with self.model.adapters_lock:
            if self._handle:
                library().llama_adapter_lora_free(self._handle)
                self._handle = None
            self.model._adapters.discard(self)
