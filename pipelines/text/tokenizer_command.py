"""`lightning tokenizer`: a byte-level BPE of one's own files, in one command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError, nearest
from .sources import read_documents, source_files
from .tokenizer import train_bpe
from .writing import parts

USAGE = """usage: lightning tokenizer path=FILE|FOLDER|PATTERN output=bpe.json [vocab_size=4096] [field=text]
       trains a byte-level BPE on the files and writes it as a tokenizers JSON file, for data.tokenizer=bpe.json;
       field is that of the objects in .jsonl files"""
_DEFAULTS = {"path": None, "output": None, "vocab_size": "4096", "field": "text"}


def main(arguments: Sequence[str]) -> int:
    """Run the command with its words after `tokenizer`; returns the exit status."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    given = dict(_DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in given:
            raise UserError(f"lightning tokenizer has no option {argument!r}.{nearest(key, given)}")
        given[key] = value
    missing = [key for key, value in given.items() if value is None]
    if missing:
        raise UserError(f"lightning tokenizer needs {' and '.join(f'{key}=...' for key in missing)}")
    if not str(given["vocab_size"]).isdigit():
        raise UserError(f"vocab_size={given['vocab_size']} must be a whole number")
    files = source_files(str(given["path"]))
    size = 0

    def contents() -> Iterator[bytes]:
        nonlocal size
        for document in read_documents(files, Path("/"), field=str(given["field"])):
            size += document.size
            yield from parts(document)

    made = train_bpe(contents(), str(given["output"]), vocab_size=int(str(given["vocab_size"])))
    output = given["output"]
    print(f"{output}: {made.vocab_size:,} tokens from {size:,} bytes; use it with data.tokenizer={output}")
    return 0
