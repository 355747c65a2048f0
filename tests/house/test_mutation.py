"""The mutation run: which places are left out, which lines belong together, and what its table counts."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SOURCE = '''
_TINY = {"dim": 4 + 1}
LIMIT = 8 + 1

def run(x: "Tensor[3 + 1]", size=2 + 1) -> "4 + 1":
    """Docs."""
    steps = {"cpu": 5 + 1, "cuda": 6 + 1}
    if x.is_cuda:
        return 7 + 1
    if x > 1:
        raise ValueError(f"{x + 1} is more than {0 + 1}")
    kernel[(1,)](x,
                 num_warps=9 + 1)
    return x + 10

class Mixer:
    variants = {"small": {**_TINY, "depth": 2 + 1}}
'''


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("_mutants"), importlib.import_module("mutation")
    for name in {"_mutants", "_mutation_runs", "_runs", "mutation"} - before:
        sys.modules.pop(name, None)


def test_places_where_a_change_cannot_matter_are_left_out(lab):
    import ast

    mutants, _ = lab
    spans = list(mutants.excluded_spans(ast.parse(SOURCE)))
    sums = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.BinOp)]
    inside = {
        ast.unparse(node): next((rule for rule, (start, end) in spans if start <= mutants._span(node)[0] < end), None)
        for node in sums
    }
    settings, cuda = "settings of the conformance suite", "reached on CUDA only"
    assert inside["4 + 1"] == settings and inside["6 + 1"] == inside["7 + 1"] == cuda
    assert inside["9 + 1"] == "launch configuration" and inside["x + 1"] == inside["0 + 1"] == "message"
    assert [inside[text] for text in ("8 + 1", "5 + 1", "x + 10")] == [None] * 3


def test_the_lines_of_a_statement(lab):
    mutants, _ = lab
    lines = {text: number for number, text in enumerate(SOURCE.splitlines(), 1)}
    call = lines["    kernel[(1,)](x,"]
    assert mutants.statement(SOURCE, call + 1) == range(call, call + 2)
    test = lines["    if x > 1:"]
    assert mutants.statement(SOURCE, test) == range(test, test + 1)  # without its body
    assert mutants.statement(SOURCE, test + 1) == range(test + 1, test + 2)


def test_one_change_of_each_place_whatever_else_the_file_holds(lab):
    pytest.importorskip("cosmic_ray", reason="the mutation run needs cosmic-ray, which no extra has")
    mutants, _ = lab
    excluded: Counter[str] = Counter()
    places = mutants.find_places(SOURCE, "a.py", 0, excluded)
    assert places and excluded["message"] and excluded["launch configuration"]
    longer = mutants.find_places(SOURCE + "\nother = 1 - 1\n", "a.py", 0, Counter())
    keys = {place.key for place in places}
    assert [place.key for place in longer if place.key in keys] == [place.key for place in places]
    for place in places:
        mutated, before, after = mutants.mutate(SOURCE, place)
        assert mutated != SOURCE and before != after


def test_equivalent_mutants_count_neither_as_killed_nor_as_survivors(lab):
    _, mutation = lab
    row = {"path": "a.py", "before": "x", "after": "y", "outcome": "survived"}
    rows = [row, {**row, "after": "z"}, {**row, "outcome": "timeout"}, *[{**row, "outcome": "killed"}] * 2]
    line = mutation.figures("a.py", 9, rows, {("a.py", "x", "y"): "equal"})
    assert line.startswith("| a.py | 9 | 5 | 2 | 1 | 1 | 1 | 25.0 % |")


@pytest.mark.parametrize(
    ("source", "test", "mine"),
    [
        ("kernels/ema/fused.py", "tests/kernels/test_ema_triton.py::test_x", True),
        ("kernels/lse.py", "tests/kernels/test_lse.py::test_x", True),
        ("blocks/mixers/mamba.py", "tests/blocks/test_mamba.py::test_x", True),
        ("blocks/mixers/mamba.py", "tests/blocks/test_mamba2.py::test_x", False),
        ("kernels/softmax/band.py", "tests/blocks/test_softmax.py::test_x", False),
    ],
)
def test_the_tests_that_are_a_sources_own(lab, source, test, mine):
    assert lab[1].own(source, test) == mine
