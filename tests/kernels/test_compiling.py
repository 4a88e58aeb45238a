"""The compiler is called once for each source, never twice; where it cannot help, a line says so."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from tryplicity.kernels import compiling

SOURCE = 'extern "C" int answer() {{ return {}; }}\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of its own and a cache of its own."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRYPLICITY_KERNELS", raising=False)
    monkeypatch.setattr(compiling, "_reason", None)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE.format(42))
    return path


@pytest.fixture
def calls(monkeypatch):
    """The names of the sources that the compiler was called for."""
    made, real = [], compiling._compile

    def counted(sources, *rest):
        made.append([source.name for source in sources])
        return real(sources, *rest)

    monkeypatch.setattr(compiling, "_compile", counted)
    return made


def kept():
    return sorted(path.name for path in compiling.cache_folder().iterdir())


def test_compiled_once_and_again_when_the_source_changes(source, calls):
    assert compiling.compile_library(source).answer() == 42
    assert compiling.compile_library(source).answer() == 42
    assert len(calls) == 1
    source.write_text(SOURCE.format(43))
    assert compiling.compile_library(source).answer() == 43
    assert len(calls) == 2 and len(kept()) == 2
    assert compiling.why_not() is None


def test_found_again_by_another_process(source, calls, monkeypatch):
    compiling.compile_library(source)
    monkeypatch.setattr(compiling, "_loaded", {})  # as a process that starts has it
    assert compiling.compile_library(source).answer() == 42
    assert len(calls) == 1


def test_a_header_beside_it_counts(source, calls):
    header = source.with_name("number.h")
    header.write_text("#define NUMBER 1\n")
    source.write_text('#include "number.h"\n' + SOURCE.format("NUMBER"))
    assert compiling.compile_library(source).answer() == 1
    header.write_text("#define NUMBER 2\n")
    assert compiling.compile_library(source).answer() == 2


def test_several_sources_make_one_library(source):
    other = source.with_name("other.cpp")
    other.write_text('extern "C" int answer();\nextern "C" int twice() { return 2 * answer(); }\n')
    assert compiling.compile_library(source, other).twice() == 84


def test_two_processes_at_once(source):
    program = textwrap.dedent(f"""
        from pathlib import Path
        from tryplicity.kernels.compiling import compile_library
        print(compile_library(Path({str(source)!r})).answer())
    """)
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42", "42"]
    assert len(kept()) == 1, "nothing half made is left, and both made the same"


def test_a_mistake_in_the_source_gives_none_and_a_line(source):
    source.write_text("int answer( {\n")
    assert compiling.compile_library(source) is None
    assert re.search(r"cannot compile answer\.cpp .*error.*plain PyTorch", compiling.why_not())
    assert "\n" not in compiling.why_not()
    assert kept() == []


@pytest.mark.parametrize("broken, expected", [
    ("#!/bin/sh\necho internal error >&2\nexit 1\n", "internal error"),
    ("#!/bin/sh\nexit 0\n", "it ended with 0"),
    ("#!/bin/sh\nfor last; do :; done\necho junk > $last\n", "does not load"),
], ids=["fails", "makes nothing", "makes junk"])
def test_a_broken_compiler_gives_none_and_a_line(source, monkeypatch, broken, expected):
    compiler = source.with_name("broken")
    compiler.write_text(broken)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert compiling.compile_library(source) is None
    assert expected in compiling.why_not() and "\n" not in compiling.why_not()


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert compiling.compile_library(source) is None
    assert "no C++ compiler found" in compiling.why_not()


def test_what_a_compiler_does_not_know_is_left_out(source, monkeypatch):
    """One without a name for this processor."""
    compiler = source.with_name("old")
    compiler.write_text('#!/bin/sh\nfor word; do case $word in -march=*|-mcpu=*) echo "error: $word" >&2; '
                        f'exit 1;; esac; done\nexec {compiling.find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert compiling.compile_library(source).answer() == 42


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is a folder that nobody can write to")
def test_a_cache_that_cannot_be_written_to(source, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", "/proc/nowhere")
    assert compiling.compile_library(source).answer() == 42


def test_switched_off_gives_the_same_numbers(tmp_path):
    """A whole process without the library: every function, and the line that says why."""
    program = textwrap.dedent("""
        import sys, torch
        from tryplicity import kernels
        generator = torch.Generator().manual_seed(0)
        digits = torch.randint(-1, 2, (3, 50, 130), generator=generator, dtype=torch.int8)
        x, table = torch.randn(7, 130, generator=generator), torch.randn(20, 130, generator=generator)
        matrix = kernels.TernaryMatrix.from_packed(kernels.pack(digits), torch.tensor([0.1, 0.2, 0.3]), 130)
        one = kernels.TernaryMatrix.from_digits(digits[0], 0.1)
        row, expert = torch.tensor([0, 6, 3, 3]), torch.tensor([2, 0, 0, 1])
        torch.save([kernels.unpack(kernels.pack(digits), 130), matrix.digits(), *kernels.quantise(x),
                    kernels.ternary_linear(x, one, x[0, :50]), kernels.ternary_experts(x, matrix, row, expert),
                    kernels.ternary_experts(x, matrix, row, expert, torch.rand(4, generator=generator)),
                    kernels.rows_linear(x, table).round(decimals=3)], sys.argv[1])
        print(kernels.why_not())
    """)
    results, lines = [], []
    for switch in ("1", "0"):
        path = tmp_path / switch
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True,
                              env={**os.environ, "TRYPLICITY_KERNELS": switch}, timeout=120)
        lines.append(done.stdout.strip())
        results.append(torch.load(path))
    assert lines[0] == "None" and "TRYPLICITY_KERNELS=0" in lines[1]
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=0.0011 if compiled.shape == (7, 20) else 0)
