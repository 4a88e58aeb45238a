"""What the model is asked, within a budget, and what is quoted in its place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import Passage
from tryplicity.search.answer import INSTRUCTIONS, fitted, messages, quotation
from tryplicity.search.citations import _marks, _pieces, check

JOIN = Passage("a", "os.path.join", "u:a", "join(a, *p)\n\n"
               "Join two or more pathname components, inserting '/' as needed. If any component is an absolute path, "
               "all previous path components will be discarded.", 2.0)
APPEND = Passage("b", "list.append", "u:b", "append(object, /)\n\nAppend object to the end of the list.", 1.0)
TALK = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": "I am."}]


def words(asked):
    return sum(len(message["content"].split()) for message in asked)


def test_everything_where_there_is_room():
    asked = messages("How do I join paths?", [JOIN, APPEND], TALK)
    assert [m["role"] for m in asked] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert asked[0]["content"] == INSTRUCTIONS and asked[1:-1] == TALK
    last = asked[-1]["content"]
    assert last.startswith("Sources:\n\n[1] os.path.join\njoin(a, *p)") and "\n\n[2] list.append\n" in last
    assert last.endswith("\n\nQuestion: How do I join paths?")


def test_without_passages_the_question_alone():
    assert messages("Hi", [], TALK) == [*TALK, {"role": "user", "content": "Hi"}]


def test_what_is_given_up_first():
    """Old exchanges, then the last passages, then most of each passage, then all of it; never the question."""
    def within(budget):
        asked = messages("How do I join paths?", [JOIN, APPEND], TALK, count=words, budget=budget)
        text = " ".join(m["content"] for m in asked)
        return ["Hello" in text, "there" in text, "[2]" in text, "[1]" in text, "join paths?" in text]

    full = words(messages("How do I join paths?", [JOIN, APPEND], TALK))
    assert within(full) == [True] * 5
    assert within(full - 1) == [False, True, True, True, True]
    assert within(full - 7) == [False, False, True, True, True]
    assert within(full - 12) == [False, True, False, True, True]
    assert within(full - 19) == [False, False, False, True, True]
    assert within(1) == [False, False, False, False, True]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.lists(
    st.text(max_size=200).map(lambda text: Passage("i", "t", "u:", text, 1.0)), max_size=4), st.integers(0, 2))
def test_a_budget_is_kept_and_numbers_stay(budget, passages, exchanges):
    history = TALK[:2 * exchanges]
    asked = messages("What is it?", passages, history, count=words, budget=budget)
    assert words(asked) <= budget or asked == [{"role": "user", "content": "What is it?"}]
    assert asked[-1]["content"].endswith("What is it?") and [m["role"] for m in asked].count("system") <= 1
    roles = [m["role"] for m in asked if m["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_the_nearest_sentences_are_quoted_with_their_source():
    quoted = quotation("How do I join two paths?", [APPEND, JOIN], limit=1)
    assert quoted == "> Join two or more pathname components, inserting '/' as needed. [2]"
    assert quotation("What is a zebra?", [JOIN, APPEND]) is None and quotation("Why?", []) is None


def test_a_quotation_is_markdown_that_shows_its_letters():
    text = "Call __init__ of the list, `list`, with *args and a <tag> of \\ and [more]."
    assert quotation("list", [Passage("i", "t", "u:", text, 1.0)]) == (
        r"> Call \_\_init\_\_ of the list, \`list\`, with \*args and a \<tag> of \\ and \[more\]. [1]")
    for begin, escaped in (("1. list", r"> 1\. list"), ("# list", r"> \# list"), ("- list", r"> \- list")):
        assert quotation("list", [Passage("i", "t", "u:", f"{begin} is the best word", 1.0)]).startswith(escaped)


def test_a_quotation_is_borne_out_and_says_nothing_else():
    quoted = quotation("How do I append to a list and join paths?", [JOIN, APPEND], limit=3)
    checked = check(quoted, [JOIN, APPEND])
    assert checked.text == quoted and checked.supported
    for line in quoted.split("\n"):
        if line != ">":
            sentence, number = line.removeprefix("> ").rsplit(" [", 1)
            assert sentence in [JOIN, APPEND][int(number[0]) - 1].text


@pytest.mark.parametrize("text", ["See [1] for joining the paths of it.", "Join the paths [9] now, all of them."])
def test_marks_of_a_passage_are_not_ours(text):
    quoted = quotation("join paths", [Passage("i", "t", "u:", text, 1.0)])
    assert quoted == f"> {text.replace('[', chr(92) + '[').replace(']', chr(92) + ']')} [1]"
    marks = [mark[0] for _, piece in _pieces(quoted) for mark in _marks(piece)]
    assert marks == ["[1]"]     # the one at the end


def test_sources_are_shortened_before_the_last_one_is_given_up():
    """A small context reads at least one source as long as there is room for fifteen words of it."""
    long = [Passage(str(n), f"Title{n}", f"u:{n}", " ".join(f"Words{n} of path {i} here." for i in range(60)), 1.0)
            for n in range(5)]
    full = words(messages("How do I join paths?", long, count=words))
    alone = len(f"{INSTRUCTIONS} Sources: [1] Title0 Question: How do I join paths?".split())
    read = [sum(f"[{n}]" in messages("How do I join paths?", long, count=words, budget=budget)[-1]["content"]
                for n in range(1, 6)) for budget in range(alone + 15, full + 1)]
    assert min(read) == 1 and max(read) == 5 and {2, 3, 4} <= set(read)
    assert "[1]" not in messages("How do I join paths?", long, count=words, budget=alone)[-1]["content"]


def of(*texts, titles=("t",) * 9):
    return [Passage(str(n), title, "u:", text, 1.0) for n, (text, title) in enumerate(zip(texts, titles, strict=False))]


SIXTY = " ".join(["zebra", "eats", *(f"w{n}" for n in range(57)), "grass."])


@pytest.mark.parametrize("text, quoted", [
    ("A zebra eats grass.", True), ("A zebra eats.", False),                    # three words that say something
    (SIXTY, True), (SIXTY.replace(".", " more."), False),                       # sixty words at most
    (">>> zebra eats grass", False), ("... zebra eats grass", False), ("zebra(eats, green, grass)", False),
    ("zebra(eats, grass) -> green food", False), ("zebra: green ::= grass food", False),
    ("The zebra(x) eats green grass.", True), ("Lions sleep all day long.", False)])
def test_which_sentences_may_be_quoted(text, quoted):
    assert (quotation("zebra", of(text)) is not None) == quoted


def test_the_rarer_word_of_the_question_is_nearer_and_a_title_counts_half():
    """Of three passages zebra is in one, grass in all: log 4 against log 2."""
    passages = of("Green grass grows here. A zebra sleeps well.", "Dry grass burns well.", "Wet grass smells good.")
    assert quotation("zebra grass", passages, 1) == "> A zebra sleeps well. [1]"
    assert quotation("zebra grass", passages) == "> Green grass grows here. [1]\n>\n> A zebra sleeps well. [1]"
    assert quotation("zebra grass", passages, 9).count("\n>\n") == 3
    # its title's word alone: half of log 2, which is less than all of it, though that is in the second passage
    titled = of("It sleeps well all day.", "A zebra sleeps well.", titles=("Zebra", "Page"))
    assert quotation("zebra", titled, 1) == "> A zebra sleeps well. [2]"
    # said twice, in the title and in the sentence, it counts once
    both = of("A zebra sleeps well.", "A zebra eats here.", titles=("Page", "Zebra"))
    assert quotation("zebra", both, 1) == "> A zebra sleeps well. [1]"


def test_a_passage_further_down_must_be_nearer_by_the_root_of_its_number():
    """Two words of the question in the fourth passage are no more than one in the first; in the third they are."""
    def nearest(at):
        texts = [f"Some lions w{n} sleep." for n in range(4)]
        texts[0] += " The zebra runs fast."
        texts[at - 1] += " A zebra eats some mango."
        texts += ["A mango tree grows."]    # as rare as zebra
        return quotation("zebra mango", of(*texts), 1)

    assert nearest(3) == "> A zebra eats some mango. [3]"
    assert nearest(4) == "> The zebra runs fast. [1]"
    assert quotation("zebra", of("A zebra eats grass.", "A zebra eats mango."), 1).endswith("grass. [1]")


def test_a_budget_to_the_word():
    """What fits exactly is kept; of a passage, sentences nearest to the question, in their order."""
    text = "Lions w1 w2 sleep. " * 12 + "Zebras eat a lot of grass. " + "Lions w1 w2 run. " * 12 + "The zebra sleeps."
    passages = of(text)
    full = words(messages("Do zebras eat?", passages))
    assert text.strip() in messages("Do zebras eat?", passages, count=words, budget=full)[-1]["content"]
    short = messages("Do zebras eat?", passages, count=words, budget=full - 1)[-1]["content"]
    read = short.removeprefix("Sources:\n\n[1] t\n").removesuffix("\n\nQuestion: Do zebras eat?")
    # 9 words of these two, and as many lions' of four as sixty words hold
    assert read.split(". ").index("Zebras eat a lot of grass") == 12 and read.endswith("The zebra sleeps.")
    assert len(read.split()) == 6 + 3 + 12 * 4
    for most in (30, 15):
        less = words(messages("Do zebras eat?", passages, count=words, budget=full - 1)) - (60 - most) + 6
        read = messages("Do zebras eat?", passages, count=words, budget=less)[-1]["content"]
        assert "Zebras eat a lot of grass." in read and "The zebra sleeps." in read
    none = messages("Do zebras eat?", passages, count=words, budget=5)
    assert none == [{"role": "user", "content": "Do zebras eat?"}]


def test_a_sentence_longer_than_there_is_room_for_is_cut():
    passages = of("zebra " + " ".join(f"w{n}" for n in range(99)))
    asked = messages("zebra?", passages, count=words, budget=words(messages("zebra?", passages)) - 1)
    assert asked[-1]["content"].split("\n")[3] == "zebra " + " ".join(f"w{n}" for n in range(59))


def test_how_many_passages_are_read_is_told():
    passages = of("A zebra eats grass.", "A lion eats zebras.")
    assert fitted("zebra", passages).passages == 2
    full = words(messages("zebra", passages))
    assert fitted("zebra", passages, count=words, budget=full - 1).passages == 1
    assert fitted("zebra", passages, count=words, budget=1) == ([{"role": "user", "content": "zebra"}], 0)
    assert fitted("zebra", []).passages == 0 and messages("zebra", of("x", titles=("A\n b",)))[-1]["content"] == (
        "Sources:\n\n[1] A b\nx\n\nQuestion: zebra")


def test_less_and_less_is_read():
    """Of three passages of a hundred words: the last go first, as long as two are whole; then each is cut down."""
    passages = of(*(" ".join([name] * 100) for name in ("zebra", "lion", "tiger")))
    seen = []
    for budget in range(words(messages("zebra?", passages)), -1, -1):
        text = messages("zebra?", passages, count=words, budget=budget)[-1]["content"]
        read = [text.replace("zebra?", "").split().count(name) for name in ("zebra", "lion", "tiger")]
        if not seen or seen[-1] != read:
            seen.append(read)
    assert seen == [[100, 100, 100], [100, 100, 0], [60, 60, 60], [60, 60, 0], [60, 0, 0], [30, 0, 0], [15, 0, 0],
                    [0, 0, 0]]
    assert fitted("zebra?", passages, count=words, budget=0) == ([{"role": "user", "content": "zebra?"}], 0)


def test_sentences_fill_the_room_to_the_last_word():
    def sentence(name, size):
        return " ".join([name.title(), *[name] * (size - 2), "zebra."])

    for sizes, kept in (((30, 30, 9), 60), ((30, 31, 9), 39), ((60, 9, 9), 60), ((61, 9, 9), 18)):
        passages = of(" ".join(sentence(name, size) for name, size in zip(("lion", "tiger", "bear"), sizes,
                                                                         strict=True)) + " And more." * 30)
        alone = words(messages("zebra?", of("x"))) - 1
        read = messages("zebra?", passages, count=words, budget=alone + 60)[-1]["content"].split("[1] t\n")[1]
        filled = read.removesuffix("\n\nQuestion: zebra?").replace("And more.", "")
        assert len(filled.split()) == kept


def test_a_title_that_is_asked_for_outweighs_a_frequent_word_by_half_its_rarity():
    """log 5 / 2 = 0.80 of zebra's, which is in one of four; log (7 / 3) / sqrt 2 = 0.60 of grass in the second."""
    passages = of("Lions sleep all day long.", *(f"Green grass grows w{n} fast." for n in range(3)),
                  titles=("Zebra", "t", "t", "t"))
    assert quotation("zebra grass", passages, 1) == "> Lions sleep all day long. [1]"


def test_a_small_model_of_others_reads_the_nearest_sentences_and_last_what_to_do():
    long = Passage("a", "os.path.join", "u:a", "Paths are joined by join. " + "Nothing else here is of use. " * 40, 2.0)
    asked = messages("How do I join paths?", [long, APPEND], TALK, focused=True)
    assert asked[0]["content"] == INSTRUCTIONS and asked[1:-1] == TALK
    last = asked[-1]["content"]
    assert "Paths are joined by join." in last and "[2] list.append\n" in last and words(asked[-1:]) < 120
    assert last.endswith("Question: How do I join paths?\n\nAnswer from the sources, in their words, and name the "
                         "source like [1].")
