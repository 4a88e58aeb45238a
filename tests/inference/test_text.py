"""Streaming text: whole characters only, stop strings never shown, in part or whole."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tryplicity.data import load_tokenizer
from tryplicity.inference.text import TextStream, token_bytes

TEXT = "naïve → 語 😀 done. stop here\nand not here"


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return load_tokenizer(prepared.tokenizer_path)


def pieces(tokenizer, text, stop=()):
    stream = TextStream(token_bytes(tokenizer), stop)
    out = []
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        out.append(stream.feed(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


def test_the_bytes_of_all_tokens_are_the_text(tokenizer):
    table = token_bytes(tokenizer)
    assert b"".join(table[i] for i in tokenizer.encode(TEXT, add_special_tokens=False).ids) == TEXT.encode()
    assert table[:6] == [b""] * 6 and sorted(b for b in table if len(b) == 1) == [bytes([b]) for b in range(256)]


def test_no_piece_holds_half_a_character(tokenizer):
    out, _ = pieces(tokenizer, TEXT)
    assert "".join(out) == TEXT
    assert not any("\ufffd" in piece for piece in out)
    assert len([piece for piece in out if piece]) > 10  # and yet it streams


def test_an_unfinished_character_shows_at_the_end(tokenizer):
    stream = TextStream(token_bytes(tokenizer))
    first_byte = next(i for i, b in enumerate(token_bytes(tokenizer)) if b == "😀".encode()[:1])
    assert stream.feed(first_byte) == "" and stream.finish() == "\ufffd"


def test_half_a_character_at_the_end_of_what_was_cut_off_is_left_out():
    for size in range(1, 4):
        stream = TextStream(["да".encode(), "😀".encode()[:size]])
        assert stream.feed(0) + stream.feed(1) + stream.finish(cut_off=True) == "да"


def test_words_added_to_a_vocabulary_are_written_as_they_are():
    """A special one has no text; another may hold any character, also such as no byte is written as."""
    from tokenizers import AddedToken, Tokenizer, models

    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1}, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens([AddedToken("日本 go", normalized=False)])
    assert token_bytes(tokenizer) == [b"a", b" ", b"", "日本 go".encode()]


# few characters of one to four bytes, so that what is cut out of one text is often in another
TEXTS = st.text("aж語😀\n", max_size=12)


@st.composite
def cut_bytes(draw):
    """The bytes of a text of any script, sometimes with bytes that are none, cut anywhere into tokens; and stops."""
    parts = draw(st.lists(TEXTS.map(str.encode) | st.sampled_from([b"\xff", b"\xf0\x9f", b"\x80"]), max_size=5))
    whole = b"".join(parts)
    cuts = sorted(draw(st.sets(st.integers(0, len(whole)), max_size=8)) | {0, len(whole)})
    return [whole[a:b] for a, b in itertools.pairwise(cuts)], draw(st.lists(TEXTS, max_size=3))


@given(cut_bytes())
@settings(deadline=None, max_examples=200)
@example((["дa".encode() + "ж".encode()[:1], "ж".encode()[1:]], ["a"]))  # the stop and half of what comes after it
@example(([b"abc"], ["abc", "b"]))
def test_the_text_shown_is_that_before_the_first_stop_string_however_it_is_cut(tokens_and_stops):
    tokens, stops = tokens_and_stops
    stream = TextStream(tokens, stops)
    moments = [stream.feed(number) for number in range(len(tokens))]
    moments.append(stream.finish())
    text = b"".join(tokens).decode(errors="replace")
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop and stop in text]
    wanted = text[:min(ends)[1]] if ends else text
    assert "".join(moments) == wanted and stream.stopped == bool(ends)
    assert stream.shown == len(wanted)


@pytest.mark.parametrize("stop, shown", [(["stop here"], TEXT.split("stop")[0]), (["\n"], TEXT.split("\n")[0]),
                                         (["here\nand", "stop"], TEXT.split("stop")[0]), (["absent"], TEXT),
                                         (["😀"], TEXT.split("😀")[0]), ([""], TEXT), (["not here!"], TEXT)])
def test_a_stop_string_ends_the_text_before_it(tokenizer, stop, shown):
    out, stream = pieces(tokenizer, TEXT, stop)
    assert "".join(out) == shown and stream.stopped == (shown != TEXT)
    for i in range(len(out)):  # at no moment was a part of it on the screen
        assert shown.startswith("".join(out[:i]))


def test_signs_that_stand_for_no_byte_are_a_fault():
    """68 bytes are no visible sign of Latin-1: chr(256) to chr(323) stand for them."""
    from tokenizers import Tokenizer, models

    assert token_bytes(Tokenizer(models.BPE({"\u0100": 0, "\u0143": 1, "ÿ": 2}, []))) == [b"\0", b"\xad", b"\xff"]
    for wrong in ("\u0144", " ", "語"):
        with pytest.raises(KeyError):
            token_bytes(Tokenizer(models.BPE({"a": 0, wrong: 1}, [])))
