import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import UserError
from tryplicity.data.tokenizer import (
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat and the cat ate the rat\n" * 3,
         "def f(x):\n    return x ** 2  # 12345\n" * 3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_special_tokens_stand_first(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(6)] == list(SPECIAL_TOKENS) == [
        "<|pad|>", "<|eos|>", "<|bos|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids[::len(tokenizer.encode("the").ids) + 1] == [4, 5]


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_whole_without_unknown_tokens(tokenizer, text):
    if any(special in text for special in SPECIAL_TOKENS) or text.encode("utf-8", "replace").decode() != text:
        return
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and 3 not in ids
    sizes = token_bytes(tokenizer)
    assert sum(sizes[i] for i in ids) == len(text.encode())


def test_training_is_repeatable_and_saving_exact(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert load_tokenizer(tmp_path / "tokenizer.json", 300).to_str() == tokenizer.to_str()
    assert train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()


def test_a_size_unlike_the_spec_is_refused_with_both_numbers_and_the_remedy(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"has 300 tokens and the spec's vocab_size is 4096.*--set "
                                        "vocab_size=300"):
        load_tokenizer(tmp_path / "tokenizer.json", 4096)


def test_missing_broken_and_foreign_files_are_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(path)
    path.write_text(tokenizer.to_str()[:500])
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json, or one cut short"):
        load_tokenizer(path)
    foreign = json.loads(tokenizer.to_str())
    foreign["added_tokens"], foreign["model"]["vocab"] = [], {"a": 0, "b": 1}
    foreign["model"]["merges"], foreign["model"]["unk_token"] = [], None
    path.write_text(json.dumps(foreign))
    with pytest.raises(UserError, match=r"token 0 must be <\|pad\|> and is a"):
        load_tokenizer(path)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_the_size_it_reached():
    with pytest.raises(UserError, match="too small for a vocabulary of 5000: it yields") as caught:
        train_tokenizer(TEXTS, 5000)
    reached = int(str(caught.value).split("vocab_size=")[1].split(")")[0])
    assert train_tokenizer(TEXTS, reached).get_vocab_size() == reached


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"261 is too small.*at least 262"):
        train_tokenizer(TEXTS, 261)
    assert train_tokenizer(TEXTS, SMALLEST_VOCABULARY).get_vocab_size() == 262
