"""The builder of the optional C++ forms: built once, kept, refused with the reason where that cannot be."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from seqzoo.kernels import compiled
from seqzoo.kernels.compiled import build, cache_folder, compiler, library, refusal
from seqzoo.kernels.dispatch import choose_backend

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A cache of the test's own, and a process that built nothing yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_LOADED", {})
    monkeypatch.setattr(compiled, "_FAILED", {})


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "toy" / "answer.cpp"
    path.parent.mkdir()
    path.write_text(ANSWER)
    return path


@pytest.fixture
def compilations(monkeypatch):
    """The sources that were compiled, in order."""
    seen, compile_ = [], compiled._compile

    def counted(command, source, target):
        seen.append(source)
        compile_(command, source, target)

    monkeypatch.setattr(compiled, "_compile", counted)
    return seen


@needs_compiler
def test_a_source_is_built_once(source, compilations):
    assert library(source).answer() == 42
    first = build(source)
    assert first.parent.parent == cache_folder()
    assert library(source).answer() == 42
    compiled._LOADED.clear()  # another process
    assert library(source).answer() == 42
    assert compilations == [source]
    assert [p.name for p in first.parent.iterdir() if p.is_dir()] == []  # nothing left of the build


@needs_compiler
def test_a_changed_source_is_built_again(source, compilations):
    assert library(source).answer() == 42
    source.write_text(ANSWER.replace("42", "43"))
    compiled._LOADED.clear()
    assert library(source).answer() == 43
    assert len(compilations) == 2


@needs_compiler
def test_several_at_a_time_build_once(source, compilations):
    with ThreadPoolExecutor(4) as pool:
        targets = set(pool.map(build, [source] * 4))
    assert len(targets) == len(compilations) == 1


@needs_compiler
def test_flags_that_a_compiler_does_not_know_are_left_out(source, monkeypatch):
    monkeypatch.setattr(compiled, "TUNING", (("--no-such-flag",), ()))
    assert library(source).answer() == 42


@needs_compiler
def test_a_build_that_fails_says_what_the_compiler_says(source):
    source.write_text("int answer( {\n")
    with pytest.raises(RuntimeError, match=r"answer\.cpp could not be built: .* says: .*error"):
        library(source)
    assert "could not be built" in refusal(source)  # and is not tried again
    with pytest.raises(RuntimeError, match="could not be built"):
        library(source)


def test_without_a_compiler(source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    assert compiler() is None
    assert "no C++ compiler" in refusal(source)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        library(source)


def test_the_environment_names_the_compiler(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() is None
    monkeypatch.setenv("CXX", sys.executable)
    assert compiler() == sys.executable


def test_the_dispatcher_refuses_and_the_rest_works(monkeypatch, tmp_path):
    from seqzoo.kernels.selective_scan import selective_scan

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    u, b = torch.zeros(1, 3, 2), torch.zeros(1, 3, 4)
    arguments = (u, u, -torch.ones(2, 4), b, b)
    with pytest.raises(ValueError, match=r"backend='compiled' has no C\+\+ compiler.*that can: chunked"):
        selective_scan(*arguments, backend="compiled")
    assert torch.equal(selective_scan(*arguments)[0], u)


def test_a_choice_builds_nothing(compilations):
    for requested in ("auto", "compiled"):
        if requested == "auto" or compiler() is not None:
            choose_backend("selective_scan", requested, dtype=torch.float32, device="cpu")
    assert compilations == []
    assert not cache_folder().exists()


@needs_compiler
def test_sources_of_the_library_compile_without_warnings(tmp_path):
    sources = sorted((Path(compiled.__file__).parent).glob("*/*.cpp"))
    assert sources
    for path in sources:
        command = [compiler(), *compiled.FLAGS, "-fopenmp", "-Wall", "-Wextra", "-Werror", "-O0", str(path)]
        done = subprocess.run([*command, "-o", str(tmp_path / "out.so")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
