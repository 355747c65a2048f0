"""Bytes, or a `tokenizers` JSON file: text to numbers and back.

Number `separator` stands before the first and after the last token of every document: the model starts from it and
ends with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError

SPECIAL = "<|separator|>"


class Tokenizer(Protocol):
    """vocab_size: numbers 0 .. vocab_size - 1. key: names it in caches and checkpoints."""

    vocab_size: int
    separator: int
    key: str

    def encode(self, content: bytes) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes: ...


class ByteTokenizer:
    """A token is a byte. The separator is the byte 0, which text does not hold; in binary files it is a byte too."""

    vocab_size, separator, key = 256, 0, "bytes"

    def encode(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, dtype=np.uint8)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        return np.asarray(tokens, dtype=np.uint8).tobytes()


class FileTokenizer:
    """A tokenizer of the `tokenizers` package from its JSON file. It knows text, not bytes: what is not UTF-8 becomes
    U+FFFD; replaced: how many of these it has made. A special token that is written out in a text is that token there,
    the separator too.

    Raises UserError for a missing package, file or separator: the special token <|separator|>, or else one of the
    usual ends of text.
    """

    _ENDS = (SPECIAL, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError(f"data.tokenizer={path} needs the package tokenizers: pip install seqzoo[text]") from None
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"no such file: data.tokenizer={path}; bytes is the other choice")
        content = path.read_bytes()
        try:
            self._backend: Any = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"data.tokenizer={path} is not a tokenizers JSON file: {error}") from None
        self.vocab_size = self._backend.get_vocab_size()
        found = [self._backend.token_to_id(end) for end in self._ENDS]
        ids = [i for i in found if i is not None]
        if not ids:
            raise UserError(f"data.tokenizer={path} has none of the tokens {', '.join(self._ENDS)} to end a text with")
        self.separator = ids[0]
        self.replaced = 0
        self.key = f"json:{hashlib.sha256(content).hexdigest()[:16]}"  # a copy under another name is the same

    def encode(self, content: bytes) -> np.ndarray:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("utf-8", "replace")
            self.replaced += text.count("\ufffd") - content.count("\ufffd".encode())
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        return self._backend.decode(np.asarray(tokens).tolist(), skip_special_tokens=False).encode()


def create_tokenizer(choice: str | Path) -> Tokenizer:
    """`bytes`, or the path of a tokenizers JSON file."""
    return ByteTokenizer() if str(choice) == "bytes" else FileTokenizer(choice)


def train_bpe(contents: Iterable[bytes], path: str | Path, *, vocab_size: int) -> FileTokenizer:
    """Byte-level BPE over these documents, written to `path` as a tokenizers JSON file."""
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size} must be at least 257: every byte and the separator")
    try:
        import tokenizers
    except ImportError:
        raise UserError("training a tokenizer needs the package tokenizers: pip install seqzoo[text]") from None
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((content.decode("utf-8", "replace") for content in contents), trainer)
    from ..atomic import atomic_write_text

    atomic_write_text(path, backend.to_str())
    return FileTokenizer(path)


def saved_tokenizer(schema: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a model was trained with. Raises UserError when the file is another one now."""
    tokenizer = create_tokenizer(schema["tokenizer"])
    if tokenizer.key != schema["tokenizer_key"]:
        raise UserError(
            f"data.tokenizer={schema['tokenizer']} is {tokenizer.key} now, "
            f"the model was trained with {schema['tokenizer_key']}"
        )
    return tokenizer
