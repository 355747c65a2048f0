"""Tests run in forks of a process that has imported torch, on a copy of the repository: which lines each test reaches,
and whether any of them fails on a mutant."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _runs import ROOT

MEMORY = 6 << 30  # bytes that a run may map beyond what is there at its start
# What a run would import anew each time; none of it imports this library.
PRELOADED = ("torch", "torch._dynamo", "torch._inductor", "pytest", "hypothesis", "coverage", "scipy.stats", "einops")
PRELOADED += ("triton", "mambapy", "fla", "vector_quantize_pytorch", "torchaudio", "lightning", "onnxruntime")
MEASURED = ("kernels", "blocks/mixers")
# Their work is done in other processes, where it is not seen which lines they reach.
ELSEWHERE = re.compile(r"test_(ranks|sequence_parallel_models|triton_lowering|gpu)\.py$")


def prepare(copy: Path) -> None:
    """The repository at HEAD in a folder, with the links that make seqzoo importable from it."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    with subprocess.Popen(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE) as archive:
        subprocess.run(["tar", "xf", "-", "-C", str(copy)], stdin=archive.stdout, check=True)
    links = copy / "build" / "typings" / "seqzoo"
    links.mkdir(parents=True)
    folders = [copy / name for name in ("zoo", "blocks", "kernels", "pipelines", "conf", "model_cards")]
    for path in [*(copy / "seqzoo").iterdir(), *folders]:
        (links / path.name).symlink_to(Path("../../..") / path.relative_to(copy))  # a copy of the copy has its own


def preload() -> None:
    """Import what every run needs. Before it: the settings that are read at import."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what other packages bring takes longer than most tests
    os.environ.setdefault("SEQZOO_SHARED_DATA", str(ROOT.parent / "shared" / "data"))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    hypothesis = sys.modules.get("hypothesis")
    if hypothesis is not None:  # no time limit, and the same examples for every mutant
        hypothesis.settings.register_profile("mutation", deadline=None, derandomize=True, database=None)
        hypothesis.settings.load_profile("mutation")
    gc.freeze()  # what is here already need not be looked at in every fork


class Only:
    """A plugin of pytest: the tests asked for, in that order, what each took and the first that failed."""

    def __init__(self, wanted: dict[str, float] | None, switch: Callable[[str], None] | None = None) -> None:
        """wanted: the tests with the seconds each is known to take; None: all, without limits."""
        self.wanted, self.switch = wanted, switch
        self.places = {name: place for place, name in enumerate(wanted or ())}
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.wanted is not None:
            known = [item for item in items if item.nodeid in self.places]
            items[:] = sorted(known, key=lambda item: self.places[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.switch is not None:
            self.switch(nodeid)
        if self.wanted is not None:  # an endless loop ends soon
            soft = int(time.process_time() + 10 + 5 * self.wanted[nodeid])
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard), hard))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid} (cannot be imported)")


def forked(copy: Path, wall: float, cpu: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a fork with limits; {"code": "timeout"} beyond them, {"code": "died"} where it dies."""
    answer = copy.parent / f"{copy.name}.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            _isolate(copy, cpu)
            answer.write_text(json.dumps(work()), encoding="utf-8")
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + wall
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what its tests started
    if ended[0] == 0:
        os.waitpid(child, 0)
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8"))
    late = ended[0] == 0 or (os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) in (signal.SIGXCPU, signal.SIGKILL))
    return {"code": "timeout" if late else "died"}


def _isolate(copy: Path, cpu: float) -> None:
    """The copy as the library, its output in a file, nothing written beside sources, limits."""
    log = os.open(copy.parent / f"{copy.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(copy)
    typings = str(copy / "build" / "typings")
    sys.path[:] = [typings, *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks")]
    os.environ |= {"PYTHONPATH": typings, "TORCHINDUCTOR_CACHE_DIR": str(copy.parent / "inductor")}
    sys.dont_write_bytecode = True
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    for kind, limit in ((resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY), (resource.RLIMIT_CPU, int(cpu))):
        resource.setrlimit(kind, (limit, limit))


def run_tests(files: Iterable[str], plugin: Only, *options: str) -> int:
    """pytest on these files of the folder that is current."""
    import pytest

    words = [*files, "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *options]
    return int(pytest.main(words, plugins=[plugin]))


# which tests reach which lines ----------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Reach:
    """The tests that reach the lines of kernels/ and blocks/mixers/, file of tests by file, kept in a folder.

    Measured again where a file of tests is new or changed. Where a source has changed since, its lines are no longer
    known: then every test counts that reached any of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, dict[str, Any]] = {}
        self._lines: dict[tuple[str, str], dict[int, list[str]]] = {}
        if (folder / "index.json").is_file():
            self.index = json.loads((folder / "index.json").read_text(encoding="utf-8"))

    def update(self, copy: Path) -> None:
        """Run what is new or changed among the tests of kernels and blocks, without a mutant."""
        found_files = [path for folder in ("kernels", "blocks") for path in (copy / "tests" / folder).glob("test_*.py")]
        files = sorted(path.relative_to(copy).as_posix() for path in found_files)
        self.index = {name: entry for name, entry in self.index.items() if name in files}
        sources = {p.relative_to(copy).as_posix(): digest(p) for f in MEASURED for p in (copy / f).rglob("*.py")}
        for name in files:
            if ELSEWHERE.search(name) or self.index.get(name, {}).get("digest") == digest(copy / name):
                continue
            database = self.folder / f"{Path(name).stem}.db"
            found = forked(copy, 3600, 3600, lambda name=name, database=database: _measure(copy, name, database))  # type: ignore[misc]
            if found["code"] not in (0, 1, 5):
                sys.exit(f"{name} cannot be run: {found}, see {copy}.log")
            self.index[name] = {**found, "digest": digest(copy / name), "database": database.name, "sources": sources}
            print(f"reach of {name}: {len(found['seconds'])} tests, failing {found['failed'] or 'none'}", flush=True)
            (self.folder / "index.json").write_text(json.dumps(self.index), encoding="utf-8")

    def tests(self, source: Path, name: str, lines: range) -> dict[str, float]:
        """Tests that reach one of these lines, with the seconds each takes; those that fail anyway are left out."""
        chosen: dict[str, float] = {}
        for entry in self.index.values():
            by_line = self._by_line(entry["database"], name)
            wanted: Iterable[int] = lines if entry["sources"].get(name) == digest(source) else by_line
            if all(by_line.get(line, [""]) == [""] for line in wanted) and any(line in by_line for line in wanted):
                wanted = by_line  # run at import
            reached = {test for line in wanted for test in by_line.get(line, ()) if test}
            good = entry["seconds"].keys() - set(entry["failed"])
            chosen |= {test: entry["seconds"][test] for test in reached & good}
        return chosen

    def every(self) -> dict[str, float]:
        """All tests that pass, with the seconds each takes."""
        entries = self.index.values()
        return {test: s for entry in entries for test, s in entry["seconds"].items() if test not in entry["failed"]}

    def _by_line(self, database: str, name: str) -> dict[int, list[str]]:
        import coverage

        if (database, name) not in self._lines:
            data = coverage.CoverageData(str(self.folder / database))
            data.read()
            measured = next((file for file in data.measured_files() if file.endswith(f"/{name}")), None)
            self._lines[database, name] = data.contexts_by_lineno(measured) if measured else {}
        return self._lines[database, name]


def _measure(copy: Path, name: str, database: Path) -> dict[str, Any]:
    import coverage

    database.unlink(missing_ok=True)
    folders = [str(copy / folder) for folder in MEASURED]
    watch = coverage.Coverage(data_file=str(database), source=folders, config_file=False)
    plugin = Only(None, watch.switch_context)
    watch.start()
    code = run_tests([name], plugin)
    watch.stop()
    watch.save()
    return {"code": code, "failed": plugin.failed, "seconds": plugin.seconds}
