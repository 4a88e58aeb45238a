"""The compiler is called once for each source, never twice; where it cannot help, a line says so."""

import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tryplicity.kernels import compiling

SOURCE = 'extern "C" int answer() {{ return {}; }}\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of its own and a cache of its own."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRYPLICITY_KERNELS", raising=False)
    for name in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiling, "_reasons", {})
    monkeypatch.setattr(compiling, "_loaded", {})
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir()
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
    assert compiling.compile_library(source) is None
    assert "no C++ compiler found" in compiling.why_not()


def test_what_a_compiler_does_not_know_is_left_out(source, monkeypatch):
    """One without a name for this processor."""
    compiler = source.with_name("old")
    compiler.write_text('#!/bin/sh\nfor word; do case $word in -march=*|-mcpu=*) echo "error: $word" >&2; '
                        f'exit 1;; esac; done\nexec {compiling.find_compiler()[0]} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert compiling.compile_library(source).answer() == 42


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is a folder that nobody can write to")
def test_a_cache_that_cannot_be_written_to(source, calls, monkeypatch, caplog):
    """Another place serves, for the next process too; once is told."""
    monkeypatch.setenv("TRYPLICITY_CACHE", "/proc/nowhere")
    for _ in range(2):
        monkeypatch.setattr(compiling, "_loaded", {})  # as a process that starts has it
        assert compiling.compile_library(source).answer() == 42
        assert compiling.compile_library(source).answer() == 42
    assert len(calls) == 1 and len(list((source.parent / "runtime").rglob("answer-*.so"))) == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "/proc/nowhere" in told[0] and "runtime" in told[0]
    assert compiling.why_not() is None


def test_a_cache_that_nothing_can_be_run_from(source, calls, monkeypatch, caplog):
    """As where it is mounted noexec; what was compiled is not compiled again for the next place."""
    cache, real = str(compiling.cache_folder()), compiling._open

    def noexec(path):
        if str(path).startswith(cache):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(compiling, "_open", noexec)
    assert compiling.compile_library(source).answer() == 42
    assert len(calls) == 1 and "failed to map segment" in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts need root")
def test_a_cache_that_is_full(source, tmp_path):
    """A disk of a page: the compiler finds no room. In a process and a view of the disks of its own."""
    program = textwrap.dedent(f"""
        import logging
        from pathlib import Path
        from tryplicity.kernels import compiling
        logging.basicConfig()
        print(compiling.compile_library(Path({str(source)!r})).answer(), compiling.why_not())
    """)
    (tmp_path / "cache").mkdir()
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=8k none {tmp_path}/cache || exit 77\n"
                           'exec "$0" -c "$1"', sys.executable, program], capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert done.stdout.strip() == "42 None" and "No space left" in done.stderr
    assert len(list((tmp_path / "runtime").rglob("answer-*.so"))) == 1


@pytest.mark.parametrize("size", [0, 100, 4096, -1])
def test_a_library_that_was_cut_short_is_made_anew(source, calls, size):
    """Running it would end the process; so that each start is a process of its own here."""
    compiling.compile_library(source)
    (path,) = compiling.cache_folder().iterdir()
    whole = path.read_bytes()
    path.unlink()  # it is in use in this process, which would end with it
    path.write_bytes(whole[:size % len(whole)])
    program = textwrap.dedent(f"""
        from pathlib import Path
        from tryplicity.kernels.compiling import compile_library
        print(compile_library(Path({str(source)!r})).answer())
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "42") and len(kept()) == 1
    assert "damaged" in done.stderr


def test_a_library_of_other_bytes_is_made_anew(source, calls, monkeypatch):
    compiling.compile_library(source)
    (path,) = compiling.cache_folder().iterdir()
    whole = path.read_bytes()
    path.unlink()  # it is in use
    path.write_bytes(bytes([*whole[:-9], 1, *whole[-8:]]))
    monkeypatch.setattr(compiling, "_loaded", {})
    assert compiling.compile_library(source).answer() == 42
    assert len(calls) == 2 and path.read_bytes() == whole


@pytest.mark.parametrize("wrapped", ["{} {}", "'{}' {} -w", "  {}   {} "])
def test_a_compiler_with_arguments(source, monkeypatch, wrapped):
    """Such as ccache has; also in a folder whose name has spaces."""
    (folder := source.parent / "my tools").mkdir()
    wrapper = folder / "wrap" if "'" in wrapped else source.parent / "wrap"
    (real,) = compiling.find_compiler()
    wrapper.write_text(f'#!/bin/sh\necho called >> {source.parent}/log\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", wrapped.format(wrapper, real))
    assert compiling.compile_library(source).answer() == 42
    assert (source.parent / "log").read_text().count("called") == 1
    plain = folder / "g++"
    plain.symlink_to(real)
    monkeypatch.setenv("CXX", str(plain))  # unquoted, and yet one name
    assert compiling.find_compiler() == [str(plain)]


@pytest.mark.parametrize("cxx, said", [("nowhere-g++ -O3", "names none"), ("g++ 'unclosed", "No closing quotation")])
def test_a_compiler_that_is_not_there_is_told_by_its_name(source, monkeypatch, cxx, said):
    monkeypatch.setenv("CXX", cxx)
    assert compiling.compile_library(source) is None
    assert repr(cxx) in compiling.why_not() and said in compiling.why_not()


def test_flags_of_the_user(source, calls, monkeypatch, caplog):
    """They count; what they say of rounding and processors does not; those that are unknown are told and left out."""
    source.write_text('#include <cmath>\n' + SOURCE.format("NUMBER + (std::isnan(std::nan(\"\")) ? 0 : 100)"))
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=7 -ffast-math -O0")
    assert compiling.compile_library(source).answer() == 7
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=8")
    assert compiling.compile_library(source).answer() == 8
    source.write_text(SOURCE.format(42))
    monkeypatch.setenv("CXXFLAGS", "-fno-such-flag-anywhere")
    assert compiling.compile_library(source).answer() == 42
    assert "compiled without CXXFLAGS='-fno-such-flag-anywhere'" in caplog.text


def test_no_home(source):
    """A user whom the system does not know, as containers have them."""
    program = textwrap.dedent(f"""
        import os, pwd
        from pathlib import Path
        def unknown(user):
            raise KeyError(user)
        pwd.getpwuid = unknown
        from tryplicity.kernels import compiling
        print(compiling.compile_library(Path({str(source)!r})).answer(), compiling.why_not())
    """)
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("HOME", "TRYPLICITY_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "42 None" and "Traceback" not in done.stderr
    assert len(list((source.parent / "runtime").rglob("answer-*.so"))) == 1


def test_what_killed_processes_left_behind_is_removed(source, monkeypatch):
    slow = source.with_name("slow")
    slow.write_text(f"#!/bin/sh\ntouch {source.parent}/begun\nsleep 60\n")
    slow.chmod(0o755)
    program = textwrap.dedent(f"""
        from pathlib import Path
        from tryplicity.kernels.compiling import compile_library
        compile_library(Path({str(source)!r}))
    """)
    killed = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "CXX": str(slow)},
                              start_new_session=True)
    deadline = time.monotonic() + 60
    while not (source.parent / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [name.startswith(".compiling-") for name in kept()] == [True]
    running = compiling.cache_folder() / kept()[0].replace(f"-{killed.pid}-", f"-{os.getpid()}-")
    running.mkdir()  # another's that is at it stays
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert compiling.compile_library(source).answer() == 42
    assert [name for name in kept() if name.startswith(".compiling-")] == [running.name]


def test_libraries_that_nobody_has_used_for_long_are_removed(source, monkeypatch):
    made = []
    for number in range(3):
        source.write_text(SOURCE.format(number))
        compiling.compile_library(source)
        made += [name for name in kept() if name not in made]
    for name in made[:2]:
        os.utime(compiling.cache_folder() / name, (0, time.time() - 2 * compiling.UNUSED))
    source.write_text(SOURCE.format(0))
    monkeypatch.setattr(compiling, "_loaded", {})
    assert compiling.compile_library(source).answer() == 0  # now it is used again
    source.write_text(SOURCE.format(4))
    assert compiling.compile_library(source).answer() == 4
    assert made[0] in kept() and made[1] not in kept() and made[2] in kept() and len(kept()) == 3


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another processor")
@pytest.mark.parametrize("flags", ["-mno-avx512f -mno-fma", pytest.param("-mno-avx512f", marks=pytest.mark.slow),
                                   pytest.param("-mno-avx2 -mno-fma", marks=pytest.mark.slow)])
def test_processors_that_have_less(tmp_path, flags):
    """Such as have AVX2 and no FMA: all compiles, and gives the same whole numbers and nearly the same floats."""
    program = textwrap.dedent("""
        import torch
        from tryplicity import kernels
        from tryplicity_plugins.layers import native
        assert native.library() is not None and kernels.why_not() is None, kernels.why_not()
        generator = torch.Generator().manual_seed(0)
        digits = torch.randint(-1, 2, (50, 130), generator=generator, dtype=torch.int8)
        x, table = torch.randn(7, 130, generator=generator), torch.randn(20, 130, generator=generator)
        y = torch.empty_like(x)
        native.function("rms_norm", "pppiif")(x.data_ptr(), x[0].data_ptr(), y.data_ptr(), 7, 130, 1e-6)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (130,), x[0], 1e-6), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kernels.rows_linear(x, table), x @ table.T, rtol=1e-4, atol=1e-5)
        for rows, scale in ((table, None), (table.bfloat16(), None), kernels.int8_rows(table)):
            matrix, many = kernels.RowsMatrix.from_rows(rows, scale), torch.randn(30, 130, generator=generator)
            wanted = many @ matrix.weight().T
            alone = torch.cat([kernels.packed_linear(many[n : n + 1], matrix) for n in range(30)])
            torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-5)
            for count in range(1, 31):
                assert torch.equal(kernels.packed_linear(many[:count], matrix), alone[:count]), (rows.dtype, count)
        matrix = kernels.TernaryMatrix.from_digits(digits, 0.1)
        q_ND, step_N, _ = kernels.quantise(x)
        wanted = (q_ND[:, :130].double() @ digits.double().T) * step_N[:, None].double() * 0.1
        torch.testing.assert_close(kernels.packed_linear(x, matrix).double(), wanted, rtol=1e-5, atol=1e-6)
        print("good")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "CXXFLAGS": flags, "TRYPLICITY_CACHE": str(tmp_path),
                               "TRYPLICITY_KERNELS": "1"})
    assert (done.stdout.strip(), done.returncode) == ("good", 0), done.stderr[-800:]
    assert "compiled without" not in done.stderr


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
                    kernels.packed_linear(x, one, x[0, :50]), kernels.packed_experts(x, matrix, row, expert),
                    kernels.packed_experts(x, matrix, row, expert, torch.rand(4, generator=generator)),
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
