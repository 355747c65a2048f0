#!/usr/bin/env python3
"""Imports run one way: kernels <- blocks <- zoo <- pipelines. Prints each import that does not, as file:line.

    python .ci/layers.py [REPOSITORY]

What is checked in every module of the library (standard library only, nothing is imported):

- a folder imports itself and the folders below it;
- `conf` and `model_cards` are data: they import nothing of the library, and only `pipelines` reads `conf`;
- imports between folders are relative, and none names a folder as a top-level package (`import kernels` is
  someone else's package);
- nothing imports tests, benchmarks, docs or examples;
- lightning, hydra and omegaconf stay in `pipelines`: nothing reads configuration but the outermost room.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "seqzoo"
LAYERS = ("kernels", "blocks", "zoo", "pipelines")
DATA = ("conf", "model_cards")
OUTSIDE = ("tests", "benchmarks", "docs", "examples")
OUTERMOST_ONLY = ("hydra", "omegaconf", "lightning", "pytorch_lightning")
# `seqzoo/` itself is the door: it may name every folder.
ALLOWED = {
    **{folder: {*LAYERS[: height + 1]} for height, folder in enumerate(LAYERS)},
    **{folder: {folder} for folder in DATA},
    PACKAGE: {*LAYERS, *DATA},
}
ALLOWED["pipelines"] |= set(DATA)


def package_of(path: Path, root: Path) -> list[str]:
    """The package that relative imports of the module at `path` start from, as parts."""
    parts = list(path.relative_to(root).parts[:-1])
    return parts if parts[0] == PACKAGE else [PACKAGE, *parts]


def resolve(package: list[str], level: int, name: str) -> str:
    """The absolute name of what `level` dots and `name` import from `package`; "" when it leaves it."""
    if level == 0:
        return name
    if level > len(package):
        return ""
    return ".".join([*package[: len(package) - level + 1], *([name] if name else [])])


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute name, relative) of every import, in functions too, and of import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = resolve(package, node.level, node.module or "")
            # `from .. import kernels` names a folder, `from ..kernels import x` something inside one.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
            for name in names:
                yield node.lineno, name, node.level > 0
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            if function in ("import_module", "__import__") and isinstance(target, ast.Constant):
                text = str(target.value)
                dots = len(text) - len(text.lstrip("."))
                yield node.lineno, resolve(package, dots, text.lstrip(".")), dots > 0


def fault(folder: str, name: str, relative: bool) -> str | None:
    """Why a module in `folder` may not import `name`, or None."""
    first, _, rest = name.partition(".")
    if not name:
        return "a relative import that leaves the package"
    if first in OUTSIDE:
        return f"{first} is not part of the library"
    if first in (*LAYERS, *DATA):
        return f"{first} is a folder of {PACKAGE}: write a relative import"
    if first in OUTERMOST_ONLY and folder not in ("pipelines", PACKAGE):
        return f"{first} stays in pipelines"
    if first != PACKAGE:
        return None
    target = rest.partition(".")[0]
    if target in OUTSIDE:
        return f"{target} is not part of the library"
    if target in (*LAYERS, *DATA) and target not in ALLOWED[folder]:
        if target in DATA:
            return f"{target} is read from pipelines only"
        below = ", ".join(f for f in LAYERS if f in ALLOWED[folder]) or "nothing"
        return f"{folder} may import {below}, not {target}"
    if not relative:
        return "inside the library imports are relative"
    return None


def offences(root: Path) -> list[str]:
    """Every import against the rules under `root`, as 'file:line: what: why'."""
    found = []
    for folder in (*LAYERS, *DATA, PACKAGE):
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            for line, name, relative in imports(tree, package_of(path, root)):
                reason = fault(folder, name, relative)
                if reason:
                    found.append(f"{path.relative_to(root)}:{line}: imports {name or '...'}: {reason}")
    return found


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    found = offences(root)
    print("\n".join(found) if found else f"layers: {' <- '.join(LAYERS)} holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
