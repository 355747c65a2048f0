"""The machinery of the benchmarks: what a row says, and the GPU script end to end without a GPU."""

import dataclasses
import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
NEAR, BESIDE = 1 + 2**-16, 1 + 2**-15  # outputs that agree with 1 and can be told apart
ROOFS = {"copy GB/s": 10.0, "product GFLOP/s": 100.0, "exp G/s": 1.0}


@pytest.fixture
def lab(monkeypatch):
    """The modules of the benchmarks, which stand beside the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _cases
    import _measure
    import _report

    yield SimpleNamespace(cases=_cases, measure=_measure, report=_report)
    for name in ("_cases", "_measure", "_peers", "_report", "_runs"):
        sys.modules.pop(name, None)


@pytest.fixture
def clock(lab, monkeypatch):
    """Seconds that each side takes from now on, by what it returns; also counts the rounds."""
    taken: dict[float, list[float]] = {}

    def seconds(run, device, *, wall=False, calls=1):
        return taken[float(run()[0])].pop(0)

    monkeypatch.setattr(lab.cases, "seconds", seconds)
    return taken


def build(lab, bars, runs, **options):
    def side(value):
        return value if isinstance(value, Exception) else (lambda: [torch.full((3,), value)[:1]])

    sides = lab.cases.Sides({name: side(value) for name, value in runs.items()}, **options)
    return lab.cases.Case("op", "case", 8, "fwd", bars, lambda length: sides)


def test_a_row_holds_the_ratio_of_medians_and_the_part_of_the_roof(lab, clock):
    clock |= {1.0: [3e-3, 1e-3, 2e-3], NEAR: [4e-3, 40e-3, 5e-3]}
    bars = lab.cases.Bar("ours", "theirs", 0.4), lab.cases.Bar("ours", "theirs", 0.39)
    work = lab.cases.Work(flops=5e7, bytes=1e6, exps=1e5)  # 0.5, 0.1 and 0.1 ms
    case = build(lab, bars, {"ours": 1.0, "theirs": NEAR}, work=work)
    first, second = lab.cases.measure(case, CPU, ROOFS, rounds=3)
    assert (first["ours ms"], first["peer ms"], first["ratio"]) == pytest.approx((2.0, 5.0, 0.4))
    assert first["of minima"] == pytest.approx(0.25) and first["of roof"] == pytest.approx(0.25)
    assert (first["met"], second["met"], first["rounds"]) == (True, False, 3)
    assert first["difference"] == pytest.approx(2**-16, rel=1e-3)


def test_sides_that_differ_are_an_error_and_not_timed(lab, clock):
    case = build(lab, (lab.cases.Bar("ours", "theirs", 1.0),), {"ours": 1.0, "theirs": 1.01})
    (row,) = lab.cases.measure(case, CPU, ROOFS)  # the clock would raise
    assert "differ by 1.0e-02" in row["error"] and row["met"] is False and row["ours ms"] is None
    assert lab.report.summary([row])[0][""] == "error"


def test_a_side_that_is_missing_is_named(lab, clock):
    clock[1.0] = [1e-3] * 7
    absent = lab.cases.attempt(lambda: __import__("no_such_package"))
    case = build(lab, (lab.cases.Bar("ours", "theirs", 1.0),), {"ours": 1.0, "theirs": absent})
    (row,) = lab.cases.measure(case, CPU, ROOFS)
    assert row["note"] == "not run: theirs: no_such_package is not installed"
    assert (row["ours ms"], row["peer ms"], row["ratio"], row["met"]) == (1.0, None, None, None)


def test_a_peer_that_raises_is_missing_and_ours_an_error(lab, clock):
    clock[1.0] = [1e-3] * 7

    def broken():
        raise RuntimeError("no driver\nmore")

    sides = lab.cases.Sides({"ours": broken, "theirs": lambda: [torch.ones(1)]})
    bars = lab.cases.Bar("ours", "theirs", 1.0), lab.cases.Bar("theirs", "ours", 1.0)
    case = lab.cases.Case("op", "case", 8, "fwd", bars, lambda length: sides)
    first, second = lab.cases.measure(case, CPU, ROOFS)
    assert first["error"] == "RuntimeError: no driver" and first["met"] is False
    assert second["note"] == "not run: ours: RuntimeError: no driver" and second.get("error") is None


def test_the_fastest_of_several_is_the_peer(lab, clock):
    clock |= {1.0: [2e-3], NEAR: [5e-3], BESIDE: [4e-3]}
    bar = lab.cases.Bar("ours", "the fastest", 0.4, fastest=("slow", "fast"))
    case = build(lab, (bar,), {"ours": 1.0, "slow": NEAR, "fast": BESIDE})
    (row,) = lab.cases.measure(case, CPU, ROOFS, rounds=1)
    assert row["ratio"] == pytest.approx(0.5) and row["note"] == "the fastest: fast" and row["peer"] == "the fastest"


def test_bars_on_memory_and_on_the_roof(lab, clock):
    clock |= {1.0: [1e-3], NEAR: [1e-3]}
    bars = (
        lab.cases.Bar("ours", "theirs", 0.5, of="memory"),
        lab.cases.Bar("ours", "the output", 1.3, of="memory", peer_bytes=2**20),
        lab.cases.Bar("ours", "the copy", 0.45, of="roof"),
    )
    case = build(lab, bars, {"ours": 1.0, "theirs": NEAR}, work=lab.cases.Work(bytes=4e6))
    peaks = {"ours": 2.0, "theirs": 4.0}
    half, output, roof = lab.cases.measure(case, CPU, ROOFS, rounds=1, memory=peaks.get)
    assert (half["ratio"], half["met"]) == (0.5, True)
    assert (output["ratio"], output["met"]) == (2.0, False)
    assert roof["of roof"] == pytest.approx(0.4) and roof["met"] is False


def test_a_state_that_grows_misses_its_bar(lab, clock):
    clock |= {1.0: [1e-3], NEAR: [1e-3]}
    case = build(lab, (lab.cases.Bar("ours", "b", 1.1),), {"ours": 1.0, "b": NEAR}, facts={"state bytes": [8, 9]})
    (row,) = lab.cases.measure(case, CPU, ROOFS, rounds=1)
    assert row["ratio"] == 1.0 and row["met"] is False


def test_rows_measured_again_replace_the_old_ones(lab):
    def row(case, value):
        return {**dict.fromkeys(lab.report.KEYS, "x"), "case": case, "ratio": value}

    kept = lab.report.merged([row("a", 1), row("b", 1)], [row("b", 2), row("c", 2)])
    assert [(r["case"], r["ratio"]) for r in kept] == [("a", 1), ("b", 2), ("c", 2)]


def test_the_difference_is_relative_and_sees_nan_and_shapes(lab):
    a = torch.tensor([3.0, 4.0])
    assert lab.measure.difference([a, a], [a, 1.1 * a]) == pytest.approx(0.1 / 1.1)
    assert lab.measure.difference([a * float("nan")], [a]) == float("inf")
    assert lab.measure.difference([a[:1]], [a]) == float("inf")


def test_the_prob_sparse_peer_is_the_oracle(lab, monkeypatch):
    import _peers

    from seqzoo.kernels.prob_sparse import prob_sparse_attention

    q, k, v = (torch.randn(2, 40, 3, 8, dtype=torch.float64) for _ in range(3))
    sample = torch.randint(40, (40, 20))
    expected = prob_sparse_attention(q, k, v, factor=5, sample_index=sample, backend="naive")
    found = _peers.published_prob_sparse(q, k, v, factor=5, sample=sample)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def script(lab, monkeypatch):
    """Runs the main function of a script with arguments, in this process: importing torch again takes seconds."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *arguments])
        with warnings.catch_warnings():
            try:
                importlib.import_module(name).main()
            finally:
                logging.disable(logging.NOTSET)

    yield run
    for name in ("cpu", "gpu", "long_context", "_cpu_cases", "_cpu_models", "_gpu_cases", "_peers", "_probe_stream"):
        sys.modules.pop(name, None)


def test_the_gpu_script_runs_without_a_gpu(script, tmp_path):
    """All its logic but the device: tiny shapes, every kind of case."""
    only = ["linear", "SSD", "mamba", "bi_level_routing", "growth", "decode"]
    script("gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", *only)
    script("gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "softmax")
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    rows = record["rows"]
    assert list(dict.fromkeys(row["operation"] for row in rows)) == ["softmax", *only]
    assert [row for row in rows if row.get("error")] == []
    assert all(row["ours ms"] > 0 for row in rows)
    assert {row["backend"] for row in rows if row["operation"] == "linear"} == {"chunked"}
    fla = [row for row in rows if row["peer"] == "fla"]
    assert fla and all(row["note"].startswith("not run: fla") for row in fla)
    assert all(row["met"] is not None for row in rows if row["operation"] in ("softmax", "growth"))
    assert record["hardware"]["processor"] and record["packages"]["torch"] == torch.__version__
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert len([line for line in page.splitlines() if line.startswith("| ")]) == len(rows) + 2


def test_the_cpu_script_lists_every_bar(script, capsys):
    script("cpu", "--list")
    assert {line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()} == {
        *("softmax", "window", "linear", "lightning", "SSD", "mamba", "s4d", "prob_sparse", "tcnca", "vq", "agent"),
        *("informer", "decode"),
    }
    with pytest.raises(SystemExit):
        script("cpu", "--only", "lineal")


def test_a_cpu_case_runs_end_to_end(script, capsys, monkeypatch):
    """The cheapest one, on a short sequence."""
    cpu = importlib.import_module("cpu")
    short = [dataclasses.replace(case, length=64) for case in cpu.cases() if case.operation == "agent"][:1]
    monkeypatch.setattr(cpu, "cases", lambda: short)
    monkeypatch.setattr(cpu, "roofs", lambda device: ROOFS)
    script("cpu", "--quick")
    assert "two naive softmaxes" in capsys.readouterr().out


def test_the_decode_script_continues_far_into_a_text(script, tmp_path):
    """Fixed states keep their size; the one that grows is read as far as it may be, then filled with repeats."""
    names = ["softmax, window", "gla", "softmax"]
    tiny = ["--dim", "64", "--steps", "2", "--positions", "20", "200", "--chunk", "16", "--feasible", "32"]
    script("decode_text", *tiny, "--only", *names, "--out", str(tmp_path))
    record = json.loads((tmp_path / "decode_text.json").read_text(encoding="utf-8"))
    rows = {(row["model"], row["position"]): row for row in record["rows"]}
    assert list(rows) == [(name, position) for name in names for position in (20, 200)]
    for name in names:
        near, far = rows[name, 20], rows[name, 200]
        assert near["ms per token"] > 0 and near["read"] and near["tokens timed"] == 2
        assert far["read"] == (name != "softmax") and (far["prefill ms per token"] is None) != far["read"]
        if name != "softmax":
            assert near["state bytes"] == far["state bytes"]
    # four blocks of keys and values of width 64 in float32 and a position of 8 bytes, and what does not grow
    assert rows["softmax", 200]["state bytes"] - rows["softmax", 20]["state bytes"] == 180 * 4 * (2 * 64 * 4 + 8)


def test_the_long_context_script_trains_evaluates_and_merges(script, tmp_path, capsys):
    """Tiny models: rows of both tables for each, and the page of two runs together."""
    for name in ("gla", "softmax"):
        script("long_context", "--device", "cpu", "--tiny", "--models", name, "--out", str(tmp_path / name))
    script("long_context", "--merge", str(tmp_path / "gla"), str(tmp_path / "softmax"), "--out", str(tmp_path))
    record = json.loads((tmp_path / "long_context.json").read_text(encoding="utf-8"))
    assert [(fact["model"], fact["steps"]) for fact in record["rows"]] == [("softmax", 2), ("gla", 2)]
    assert len({round(fact["parameters"], -3) for fact in record["rows"]}) == 1
    for name in ("softmax", "gla"):
        rows = [row for row in record["cells"] if row["model"] == name]
        grid = {(r["task"], r["length"], r["depth"]) for r in rows if r["depth"] is not None}
        assert grid == {
            (task, length, depth)
            for task in ("passkey", "needle")
            for length in (320, 640)
            for depth in (0, 0.25, 0.5, 0.75, 1)
        }
        assert [r["items"] for r in rows if r["task"] == "mqar"] == [4, 8, 16, 32, 64]
        assert [r["length"] for r in rows if r["task"] == "induction"] == [64, 128, 256, 512]
        (line,) = (row for row in record["rows"] if row["model"] == name)
        assert line["4 pairs"] == next(r["mean"] for r in rows if r["items"] == 4)
        assert line["induction 512"] == rows[-1]["mean"]
    assert str(tmp_path) not in json.dumps(record) and "--steps 2 " in record["command"]
    page = (tmp_path / "long_context.md").read_text(encoding="utf-8")
    assert (
        page.count("| softmax | 25 % |") == page.count("| gla | 25 % |") == 2 and page in capsys.readouterr().out + page
    )
    changed = json.loads((tmp_path / "gla" / "long_context.json").read_text(encoding="utf-8"))
    changed["settings"]["steps"] = 3
    (tmp_path / "gla" / "long_context.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"other settings.*steps"):
        script("long_context", "--merge", str(tmp_path / "gla"), str(tmp_path / "softmax"), "--out", str(tmp_path))


def test_the_stream_is_a_function_of_seed_and_step(script):
    """Every target is the next token or what was paired, and every kind weighs the same."""
    stream_of = importlib.import_module("_probe_stream").ProbeStream
    stream = stream_of(90, 8, 400, 0)
    for step in (0, 1, 89):
        again, other = stream_of(90, 8, 400, 0)[step], stream_of(90, 8, 400, 1)[step]
        assert all((a == b).all() for a, b in zip(stream[step], again, strict=True))
        assert stream[step][0].shape != other[0].shape or (stream[step][0] != other[0]).any()
    assert (stream[0][0] != stream[3][0]).any()
    for tokens, targets, weights in stream:
        assert tokens.shape == targets.shape == weights.shape and tokens.size <= 8 * 400
        assert ((targets >= 0) == (weights > 0)).all()
    texts = [*range(0, 45, 3), *(step for step in range(45, 90) if step % 3)]
    assert {stream[step][0].shape[1] for step in texts} == {400}
    lengths = [stream[step][0].shape[1] for step in range(90) if step not in texts]
    assert set(lengths[:4]) == {64} and set(lengths) == {64, 128, 256} and max(lengths[:16]) < 256
    tokens, targets, weights = stream[3]  # two rows of text, six of needles
    assert weights[:2].sum() == pytest.approx(1, rel=1e-4) and weights[2:].sum() == pytest.approx(2, rel=1e-4)
    for row in range(8):
        (asked,) = np.nonzero(targets[row] >= 0)
        assert (tokens[row, asked[1:]] == targets[row, asked[:-1]]).all() and (np.diff(asked) == 1).all()
    for row in range(2, 8):
        said = bytes(int(t) for t in targets[row] if t >= 0).decode()
        answer = "".join(chr(t) for t, w in zip(targets[row], weights[row], strict=True) if w > 1e-2)
        assert said.endswith(answer) and answer.strip().isdigit() and said.count(answer.strip()) == 2
    tokens, targets, weights = stream[87]
    heads = (targets >= 0).sum(1) == 1
    assert weights[heads].sum() == pytest.approx(1, rel=1e-4) and weights[~heads].sum() == pytest.approx(1, rel=1e-4)
    for row, place in np.argwhere(targets >= 0):
        (earlier,) = np.flatnonzero(tokens[row, 1:place] == tokens[row, place]) + 1
        assert tokens[row, earlier + 1] == targets[row, place]
    with pytest.raises(ValueError, match="batch=9 must be a multiple of 4"):
        stream_of(1, 9, 400, 0)
