"""The engine's thread may fail to start, die, or be left behind by a fork: who waits hears of it, and who comes next is
served as ever."""

import contextlib
import ctypes
import os
import signal
import threading

import pytest

from tests.inference.test_engine import Ear, ask
from tryplicity.inference.engine import Busy, Engine


@pytest.fixture
def engine(packed_model):
    engine = Engine(packed_model, None, slots=2)
    yield engine
    engine.close()


class Leave(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("thrown", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Leave()],
                         ids=lambda error: type(error).__name__)
def test_whatever_a_listener_raises_is_its_own_affair(engine, packed_model, plain, thrown):
    def listener(piece):
        raise thrown

    other, ear = ask(1, 30), Ear()
    gone = engine.submit(ask(0, 30), listener)
    generation = engine.submit(other, ear)
    assert gone.wait(30) and gone.finish == "cancelled"
    assert generation.wait(30) and ear.tokens == plain(packed_model, other)
    assert list(engine.tokens(other.prompt, other.sampling, 5)) == plain(packed_model, ask(1, 5))


@pytest.mark.parametrize("thrown", [SystemExit(3), Leave()], ids=lambda error: type(error).__name__)
def test_whatever_a_model_raises_ends_the_answers_it_was_at(make_packed, plain, thrown):
    model = make_packed()
    engine, hidden = Engine(model, None), model.hidden

    def fails(ids_BT, **options):
        model.hidden = hidden
        raise thrown

    model.hidden = fails
    with pytest.raises(RuntimeError, match=f"the engine failed: {type(thrown).__name__}"):
        list(engine.generate(ask(0)))
    assert list(engine.tokens(ask(0).prompt, ask(0).sampling, 5)) == plain(model, ask(0, 5))
    engine.close()


def raise_in(thread, error):
    """Between two of its instructions, wherever it is."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error)) == 1


def test_a_thread_that_is_killed_tells_all_who_wait_and_is_replaced(engine, packed_model, plain, caplog):
    for _ in range(3):
        hold, at_work = threading.Event(), threading.Event()

        def listener(piece, hold=hold, at_work=at_work):
            at_work.set()
            hold.wait(30)

        generations = [engine.submit(ask(number, 200), listener) for number in range(4)]  # two of them wait
        assert at_work.wait(30)
        thread = engine.scheduler._thread
        engine.scheduler._await_work = lambda: (_ for _ in ()).throw(Leave("killed"))  # outside of any answer
        hold.set()
        for generation in generations:
            assert generation.wait(30) and generation.finish == "error" and generation.error == "Leave: killed"
        del engine.scheduler._await_work
        thread.join(30)
        assert not thread.is_alive()
        assert list(engine.tokens(ask(5).prompt, ask(5).sampling, 5)) == plain(packed_model, ask(5, 5))
        assert engine.scheduler._thread not in (None, thread)


def test_an_error_out_of_nowhere_hangs_nobody(engine, packed_model, plain):
    """It strikes in the middle of a round or between two, at work or at rest, where the next to come wakes it."""
    wanted, request = plain(packed_model, ask(9, 5)), ask(9, 5)
    for number in range(6):
        ear = Ear()
        generation = engine.submit(ask(number, 100), ear)
        ear.await_tokens(1 + number)
        raise_in(engine.scheduler._thread, Leave)
        assert generation.wait(30) and generation.finish in ("error", "cancelled", "length")
        with contextlib.suppress(RuntimeError):
            assert list(engine.tokens(request.prompt, request.sampling, 5)) == wanted
        assert list(engine.tokens(request.prompt, request.sampling, 5)) == wanted
    raise_in(engine.scheduler._thread, Leave)
    with contextlib.suppress(RuntimeError):
        assert list(engine.tokens(request.prompt, request.sampling, 5)) == wanted
    assert list(engine.tokens(request.prompt, request.sampling, 5)) == wanted


def test_a_thread_that_ended_without_a_word_is_noticed_by_who_waits(packed_model, plain):
    """As where its last words fail, too."""
    engine, ear = Engine(packed_model, None), Ear()
    engine.scheduler._run = lambda: None
    generation = engine.submit(ask(0, 50), ear)
    assert generation.wait(30) and (generation.finish, ear.finish) == ("error", "error")
    assert "the engine's thread has ended" in generation.error
    with pytest.raises(RuntimeError, match="the engine's thread has ended"):
        list(engine.generate(ask(0)))
    del engine.scheduler._run
    assert list(engine.tokens(ask(9).prompt, ask(9).sampling, 5)) == plain(packed_model, ask(9, 5))
    engine.close()




def test_a_thread_that_could_not_start_is_told_and_tried_again(engine, packed_model, plain, monkeypatch):
    real, tries = threading.Thread.start, []

    def no_room(thread):
        tries.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    for _ in range(2):
        with pytest.raises(Busy, match="can't start new thread"):
            engine.submit(ask(0), print)
    assert len(tries) == 2 and engine.statistics()["waiting"] == 0
    monkeypatch.setattr(threading.Thread, "start", real)
    assert list(engine.tokens(ask(9).prompt, ask(9).sampling, 5)) == plain(packed_model, ask(9, 5))


def in_a_child(work):
    """What `work` gives in a child of fork, as text; "hung" where that takes longer than half a minute."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(30)  # and then it ends
        try:
            said = repr(work())
        except BaseException as error:
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(child, 0)
    return said or "hung"


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_writes_answers_of_its_own(engine, packed_model, plain):
    wanted, request = plain(packed_model, ask(9, 5)), ask(9, 5)
    assert in_a_child(lambda: list(engine.tokens(request.prompt, request.sampling, 5))) == repr(wanted)  # at rest
    for number in range(3):
        ear = Ear()
        generation = engine.submit(ask(number, 150), ear)
        ear.await_tokens(2 + number)

        def work(generation=generation):
            ended = generation.wait(20), generation.finish, generation.error
            return *ended, list(engine.tokens(request.prompt, request.sampling, 5)), engine.close()

        told = "RuntimeError: the process was forked; the answer is written in its parent"
        assert in_a_child(work) == repr((True, "error", told, wanted, None))
        assert generation.wait(30) and ear.tokens == plain(packed_model, ask(number, 150))  # it never noticed


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_an_iterator_taken_into_a_child_ends_there(engine, packed_model, plain):
    pieces = engine.generate(ask(3, 150))
    first = next(pieces)
    assert "the process was forked" in in_a_child(lambda: list(pieces))
    rest = [token.id for piece in [first, *pieces] for token in piece.tokens]
    assert rest == plain(packed_model, ask(3, 150))
