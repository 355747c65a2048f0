"""The command: `lightning ...`, `seqzoo ...`, `python -m seqzoo ...`.

Nothing heavy is imported here: `--help` and a misspelled word answer at once.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Sequence

from .errors import UserError, nearest, one_line
from .help import COMMANDS, LISTINGS, TOOLS, help_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv where None); returns the exit status: 0 ok, 1 failed, 2 wrong input, 130
    Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `lightning --help | head`: nobody reads on. Python would complain once more when it flushes at exit.
        sys.stdout = None
        return 0


def _dispatch(arguments: list[str]) -> int:
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word in ("--help", "-h", "help"):
        from .overrides import parse_arguments

        print(help_text(None, rest, parse_arguments("fit", []).config_dirs))
        return 0
    if word in ("--version", "-V"):
        from .. import __version__

        print(f"seqzoo {__version__}")
        return 0
    if word in COMMANDS:
        return _run(word, rest)
    if word in LISTINGS:
        return _list(word, rest)
    if word == "tokenizer":
        from .text.tokenizer_command import main as train_tokenizer

        return train_tokenizer(rest)
    if word == "convert":
        from .convert_command import main as convert_checkpoint

        return convert_checkpoint(rest)
    if word == "export":
        from .export_command import main as export_program

        return export_program(rest)
    if word == "ship":
        from .ship import main as ship_run

        return ship_run(rest)
    if word == "lra":
        from .documents.lra_command import main as print_arena

        return print_arena(rest)
    delegated = _lightning_sdk(word, arguments)
    if delegated is not None:
        return delegated
    raise UserError(f"unknown command {word!r}.{nearest(word, [*COMMANDS, *LISTINGS, *TOOLS])} See lightning --help.")


def _run(command: str, arguments: list[str]) -> int:
    from .overrides import parse_arguments

    request = parse_arguments(command, arguments)
    if request.help:
        print(help_text(command, request.overrides, request.config_dirs))
        return 0
    from .launcher import launch

    return launch(request)


def _list(command: str, arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: lightning {command} [--json]\n       {LISTINGS[command]}")
        return 0
    for argument in arguments:
        if argument != "--json":
            raise UserError(f"lightning {command} takes --json only, got {argument!r}")
    as_json = "--json" in arguments
    if command == "doctor":
        from .doctor import report

        report(as_json=as_json)
        return 0
    from .listing import mixer_rows, model_rows, print_rows

    rows = mixer_rows() if command == "mixers" else model_rows()
    print_rows(rows, f"{len(rows)} {command}", as_json=as_json)
    return 0


def _lightning_sdk(word: str, arguments: list[str]) -> int | None:
    """The cloud client lightning-sdk installs a command of the same name: its words go on to it. None: not
    its word.
    """
    if word.startswith("-") or importlib.util.find_spec("lightning_sdk") is None:
        return None
    try:
        from lightning_sdk.cli.entrypoint import main_cli
    except Exception:  # a broken installation of someone else's must not hide our message
        traceback.print_exc(limit=0)
        return None
    if word not in getattr(main_cli, "commands", {}):
        return None
    saved = list(sys.argv)
    sys.argv[:] = ["lightning", *arguments]
    try:
        main_cli()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    finally:
        sys.argv[:] = saved
    return 0
