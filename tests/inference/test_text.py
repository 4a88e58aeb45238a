"""Streaming text: whole characters only, stop strings never shown, in part or whole."""

import pytest

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


@pytest.mark.parametrize("stop, shown", [(["stop here"], TEXT.split("stop")[0]), (["\n"], TEXT.split("\n")[0]),
                                         (["here\nand", "stop"], TEXT.split("stop")[0]), (["absent"], TEXT),
                                         (["😀"], TEXT.split("😀")[0]), ([""], TEXT), (["not here!"], TEXT)])
def test_a_stop_string_ends_the_text_before_it(tokenizer, stop, shown):
    out, stream = pieces(tokenizer, TEXT, stop)
    assert "".join(out) == shown and stream.stopped == (shown != TEXT)
    for i in range(len(out)):  # at no moment was a part of it on the screen
        assert shown.startswith("".join(out[:i]))
