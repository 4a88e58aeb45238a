"""Judges that are models, small ones of random weights in architectures that people use, against transformers."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.corpus.stories import story
from tryplicity import Document, load_plugins
from tryplicity.errors import UserError
from tryplicity_plugins.judges import neural


def tokenizer(folder, **more):
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([story(n) for n in range(5)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", **more).save_pretrained(folder)
    return words.get_vocab_size()


TEMPLATE = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}[it] {% endif %}")


@pytest.fixture(scope="module")
def rater(tmp_path_factory):
    """The folder of a small Qwen2 that answers as chance has it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    size = tokenizer(folder, chat_template=TEMPLATE)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         initializer_range=0.3, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a small BERT with one output, as FineWeb-Edu's classifier is."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    size = tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_labels=1,
                        num_attention_heads=4, initializer_range=0.5, max_position_embeddings=512)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def judge(name, **options):
    made = load_plugins().registry.part("judge", {"type": name, **options}).build()
    made.load(torch.device("cpu"))
    return made


def documents(texts):
    return [Document(str(number), text, "text", "") for number, text in enumerate(texts)]


TEXTS = [story(n, 2 + n % 5 * 4) for n in range(12)]


@torch.no_grad()
def test_a_rating_is_the_mean_digit_under_the_model_s_own_distribution(rater):
    """One text at a time through transformers, without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own, words = AutoModelForCausalLM.from_pretrained(rater), AutoTokenizer.from_pretrained(rater)
    digits = [words.convert_tokens_to_ids(str(digit)) for digit in range(6)]
    said = judge("llm_rater", model=str(rater), characters=300).judge(documents(TEXTS))
    for text, verdict in zip(TEXTS, said, strict=True):
        asked = words.apply_chat_template([{"role": "user", "content": neural.PROMPT.format(text=text[:300])}],
                                          tokenize=False, add_generation_prompt=True) + neural.ANSWER
        assert asked.endswith("[it] Rating: ")
        logits = own(**words(asked, return_tensors="pt")).logits[0, -1]
        chances = logits[digits].exp() / logits[digits].exp().sum()
        mean = sum(digit * chance for digit, chance in enumerate(chances.tolist()))
        assert verdict.score == pytest.approx(mean, abs=1e-3) and verdict.keep == (verdict.score >= 3)
    assert len({verdict.score for verdict in said}) > 6


@torch.no_grad()
def test_a_classifier_s_score_is_its_one_output(classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    own = AutoModelForSequenceClassification.from_pretrained(classifier)
    words = AutoTokenizer.from_pretrained(classifier)
    said = judge("fineweb_edu", model=str(classifier), keep_at=0).judge(documents(TEXTS))
    for text, verdict in zip(TEXTS, said, strict=True):
        ids = words(text, truncation=True, max_length=512, return_tensors="pt")
        score = own(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits.item()
        assert verdict.score == pytest.approx(score, abs=1e-3) and verdict.keep == (verdict.score >= 0)
    assert {verdict.keep for verdict in said} == {True, False}


def test_a_verdict_does_not_depend_on_what_else_is_judged(rater, classifier):
    for made in (judge("llm_rater", model=str(rater), characters=300), judge("fineweb_edu", model=str(classifier))):
        together = made.judge(documents(TEXTS))
        assert together == [made.judge([document])[0] for document in documents(TEXTS)]


def test_a_score_that_a_document_carries_is_taken_and_code_is_not_judged(classifier):
    made = judge("fineweb_edu", model=str(classifier))
    some = [Document("a", TEXTS[0], "text", "", 3.2), Document("b", TEXTS[1], "text", "", 2.9),
            Document("c", TEXTS[2], "text", ""), Document("d", "x = 1", "code", "", 5.0)]
    said = made.judge(some)
    assert [verdict[:2] for verdict in said[:2]] == [(3.2, True), (2.9, False)] and said[1].reason == "a score under 3"
    assert said[2] == made.judge(documents([TEXTS[2]]))[0]
    assert said[3].keep is None and math.isnan(said[3].score)
    never = judge("fineweb_edu", model=str(classifier), carried=False)
    assert never.judge(some[:1]) == never.judge(documents([TEXTS[0]]))


def test_batches_hold_texts_of_about_a_length():
    lengths = [5, 9000, 7, 8000, 6]
    batches = neural.by_length(lengths)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert batches[0] == [1] and batches[1] == [3, 2] and batches[2] == [4, 0]
    assert all(max(lengths[i] for i in batch) * len(batch) <= neural.TOKENS_AT_ONCE for batch in batches)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"the model .*nowhere cannot be loaded"):
        judge("llm_rater", model=str(tmp_path / "nowhere"))
