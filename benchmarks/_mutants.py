"""The mutants of a file: cosmic-ray's operators at every place where a change can matter, one mutant drawn for each.

Left out, and counted by rule: type annotations, messages (raise, logging, f-strings), launch configuration (num_warps,
num_stages, autotune), what only a CUDA device reaches, and the settings that the conformance suite tests mixers with.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

Span = tuple[tuple[int, int], tuple[int, int]]
# A replacement is of the same kind: `|` for `+` raises at once and would only flatter the tests.
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow")
_BITS = ("RShift", "LShift", "BitOr", "BitAnd", "BitXor")
_ORDER = ("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE")
_PLAIN = ("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd")
_PLAIN += ("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer")
_PLAIN += ("RemoveDecorator", "ZeroIterationForLoop", "ReplaceUnaryOperator_USub_Invert")


@dataclass(frozen=True)
class Place:
    """A position of a file and the changes that a kind of operator can make there, in an order that the seed decides.

    text: the line; number: among equal places of that file. choices: operator and occurrence, as cosmic-ray counts.
    """

    path: str
    line: int
    kind: str
    text: str
    column: int
    number: int
    choices: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """What names it as long as its line is there, wherever in the file."""
        return f"{self.path} {self.kind} {self.column} {self.number} {self.text}"


@cache
def operators() -> dict[str, type]:
    """cosmic-ray's operators that are used, by name."""
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    groups = [("BinaryOperator", _ARITHMETIC), ("BinaryOperator", _BITS), ("ComparisonOperator", _ORDER)]
    groups.append(("ComparisonOperator", ("Is", "IsNot")))
    names = {f"Replace{kind}_{a}_{b}" for kind, group in groups for a in group for b in group if a != b}
    names |= {name for name in provider if name.startswith("ReplaceUnaryOperator_Delete") or name in _PLAIN}
    return {name: provider[name] for name in provider if name in names}


def find_places(source: str, path: str, seed: int, excluded: Counter[str]) -> list[Place]:
    """The places of a file, in an order that the seed decides; adds what is left out to `excluded`.

    Neither the order of two places nor that of their changes depends on the rest of the file.
    """
    spans, lines = list(excluded_spans(ast.parse(source))), source.splitlines()
    found: dict[tuple[Span, str], list[tuple[str, int]]] = {}
    for operator, occurrence, span in _positions(source):
        rule = next((rule for rule, outer in spans if outer[0] <= span[0] and span[1] <= outer[1]), None)
        if operator.startswith("ReplaceBinary") and lines[span[0][0] - 1][span[0][1] :].startswith(("*,", "/,")):
            rule = "mark of a signature"
        if rule is not None:
            excluded[rule] += 1
        else:
            found.setdefault((span, operator.split("_")[0]), []).append((operator, occurrence))
    places, seen = [], Counter[str]()
    for (((line, column), _), kind), choices in sorted(found.items()):
        text = lines[line - 1].strip()
        column -= len(lines[line - 1]) - len(lines[line - 1].lstrip())
        key = f"{path} {kind} {column} {text}"
        seen[key] += 1
        drawn = sorted(enumerate(choices), key=lambda c: _rank(seed, key, seen[key], c[1][0], c[0]))
        places.append(Place(path, line, kind, text, column, seen[key], tuple(choice for _, choice in drawn)))
    return sorted(places, key=lambda place: _rank(seed, place.key))


def mutate(source: str, place: Place) -> tuple[str, str, str] | None:
    """The first change of a place that gives another program: the source, and the lines that differ, before and after.

    None where there is none.
    """
    from cosmic_ray.mutating import MutationVisitor

    same = ast.dump(ast.parse(source))
    for operator, occurrence in place.choices:
        try:
            mutated = MutationVisitor.mutate_code(source, operators()[operator](), occurrence)
            if mutated is not None and ast.dump(ast.parse(mutated)) != same:
                return mutated, *_difference(source.splitlines(), mutated.splitlines())
        except (SyntaxError, AttributeError):  # of operators that do not know every form of a clause
            continue
    return None


def statement(source: str, line: int) -> range:
    """The lines of the statement around a line; of one with a body, those before its body."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt):
            continue
        start = min((node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))))
        body = getattr(node, "body", None)
        lines = range(start, max(start, body[0].lineno - 1) + 1 if body else (node.end_lineno or start) + 1)
        if line in lines and (len(best) == 1 or len(lines) < len(best)):
            best = lines
    return best


def _positions(source: str) -> Iterator[tuple[str, int, Span]]:
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in operators().items():
        positions = (span for node in nodes for span in operator().mutation_positions(node))
        yield from ((name, number, span) for number, span in enumerate(positions))


def _rank(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    """The lines between the first and the last that differ."""
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return " ".join(line.strip() for line in before), " ".join(line.strip() for line in after)


# what is left out -----------------------------------------------------------------------------------------------------


def excluded_spans(tree: ast.AST) -> Iterator[tuple[str, Span]]:
    """Each stretch of code whose mutants cannot matter, with the rule."""
    # What a mixer is tested with stands in it as `variants`, in part by way of constants.
    given = [node for node in ast.walk(tree) if "variants" in _targets(node)]
    names = {part.id for node in given for part in ast.walk(node) if isinstance(part, ast.Name) and part.id.isupper()}
    for node in ast.walk(tree):
        if _targets(node) & {"variants", *names}:
            yield "settings of the conformance suite", _span(node)
        for decorator in getattr(node, "decorator_list", []):
            if ast.unparse(decorator) == "triton.jit":  # a helper that is no kernel is called all the same without
                yield "reached on CUDA only", ((decorator.lineno, 0), (decorator.end_lineno + 1, 0))
        for rule, nodes in _RULES.items():
            yield from ((rule, _span(part)) for part in nodes(node) if part is not None)


def _targets(node: ast.AST) -> set[str]:
    """The names that an assignment gives a value to."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _span(node: ast.AST) -> Span:
    # parso counts columns in characters, ast in bytes; the library's code is ASCII but for its texts
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def _annotations(node: ast.AST) -> Iterable[ast.AST | None]:
    if isinstance(node, ast.FunctionDef):
        return [node.returns]
    return [node.annotation] if isinstance(node, ast.arg | ast.AnnAssign) else []


def _messages(node: ast.AST) -> Iterable[ast.AST | None]:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return [node.exc]
    logs = (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "_LOG"
    )
    return [node] if logs or isinstance(node, ast.JoinedStr) else []


def _launch(node: ast.AST) -> Iterable[ast.AST | None]:
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [value for key, value in pairs if isinstance(key, ast.Constant) and key.value in _OPTIONS]
    if isinstance(node, ast.keyword):
        return [node.value] if node.arg in _OPTIONS else []
    tuned = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("autotune", "Config")
    return [node] if tuned else []


def _cuda(node: ast.AST) -> Iterable[ast.AST | None]:
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "cuda"]
    if isinstance(node, ast.IfExp) and "is_cuda" in ast.unparse(node.test):
        return [node.test, node.body]
    return [*node.body, node.test] if isinstance(node, ast.If) and "is_cuda" in ast.unparse(node.test) else []


_OPTIONS = ("num_warps", "num_stages")
_RULES: dict[str, Callable[[ast.AST], Iterable[ast.AST | None]]] = {
    "type annotation": _annotations,
    "message": _messages,
    "launch configuration": _launch,
    "reached on CUDA only": _cuda,
}
