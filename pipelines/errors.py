"""What the command line says when the user's input is wrong: one line, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input, found before training. The message: cause, value, nearest valid choice, in one line."""


def nearest(name: str, known: Iterable[str], *, number: int = 3) -> str:
    """' Did you mean a, b?' or, with nothing close, ' Known: ...'; for the end of a message.

    The registries have a function like this one; here it must not cost the import of torch.
    """
    known = sorted({str(k) for k in known})
    close = difflib.get_close_matches(str(name), known, n=number, cutoff=0.5)
    if close:
        return f" Did you mean {', '.join(close)}?"
    return f" Known: {', '.join(known)}." if known else ""


def check_whole(name: str, value: object, least: int) -> None:
    """Raise UserError unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r} must be a whole number of at least {least}")


def one_line(text: object) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(str(text).split())


@contextmanager
def user_errors() -> Iterator[None]:
    """While data, model or trainer are being built: a ValueError or a missing file is the user's to mend.

    Raises UserError in its place, with the same message.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        missing = f"no such file: {error.filename}" if error.filename else str(error)
        raise UserError(missing) from error
    except ValueError as error:
        raise UserError(str(error)) from error
