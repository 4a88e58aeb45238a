# ruff: noqa: RUF001
"""What is written is found, in any script: one function makes words of passages and of questions."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import Document
from tryplicity.search.building import build_index
from tryplicity.search.index import PassageIndex
from tryplicity.search.words import content_words, folded, humps, joined, parted, runs, stem, words


def found(tmp_path, texts, question):
    """The texts that a question finds."""
    path = build_index((Document(str(at), text, "text", "u:") for at, text in enumerate(texts)),
                       tmp_path / "index.sqlite")
    return {texts[int(passage.id.split(":")[0])] for passage in PassageIndex(path).search(question, len(texts))}


NOTES = ["Die Straße ist lang.", "Это новый дом, за́мок стоит на берегу.", "ガラスの靴をはいた猫が東京で眠る。",
         "北京是中华人民共和国的首都。", "서울은 대한민국의 수도이다.", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
         "بَيْتٌ كَبِيرٌ فِي المَدِينَة", "בַּיִת גָּדוֹל בָּעִיר", "हिन्दी में लिखा हुआ पाठ", "Η Ἀθήνα είναι πόλις μεγάλη.",
         "İstanbul'da ılık bir gün", "The naïve café serves ﬁne piñatas.", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာဘာသာ",
         "C is old.", "C++ has templates.", "C# runs on .NET.", "Ｆｕｌｌ ｗｉｄｔｈ ﾊﾝｶｸ", "Tiếng Việt có dấu",
         "ქართული ენა", "🍎 is a fruit"]


@pytest.mark.parametrize("question, note", [
    ("Straße", 0), ("STRASSE", 0), ("новый", 1), ("НОВЫЙ дом", 1), ("замок", 1), ("ガラス", 2), ("ｶﾞﾗｽ", 2), ("猫", 2),
    ("東京", 2), ("眠る猫", 2), ("首都", 3), ("中华人民共和国", 3), ("서울", 4), ("대한민국", 4), ("เมืองหลวง", 5),
    ("بيت", 6), ("بَيْتٌ", 6), ("בית", 7), ("גָּדוֹל", 7), ("हिन्दी", 8), ("लिखा", 8), ("Αθήνα", 9), ("ΠΌΛΙΣ", 9),
    ("istanbul", 10), ("ılık", 10), ("naive", 11), ("CAFÉ", 11), ("fine", 11), ("pinatas", 11), ("ພາສາ", 12),
    ("ភាសា", 13), ("ဘာသာ", 14), ("full width", 18), ("ハンカク", 18), ("tiếng việt", 19), ("ენა", 20), ("🍎", 21),
    ("What is C?", 15), ("c++", 16), ("How do I learn C++?", 16), ("C#", 17), ("c# programs", 17)])
def test_each_note_is_found_first_by_its_own_words(tmp_path, question, note):
    path = build_index((Document(str(at), text, "text", "u:") for at, text in enumerate(NOTES)), tmp_path / "i.sqlite")
    assert PassageIndex(path).search(question, 3)[0].id == f"{note}:1"


def test_what_is_another_word_is_not_found(tmp_path):
    for question, others in [("C", ["C++ templates", "C# programs"]), ("C++", ["C is old", "C# programs"]),
                             ("новыи", ["новый"]), ("か", ["が"]), ("क", ["क़ लम"]), ("京東", ["東京"]),
                             ("海上", ["上海"])]:
        assert found(tmp_path, [*others, "another text"], question) == set(), question


# letters of many scripts, with their marks, and whatever else Unicode has
SCRIPTS = ["abc ÄÖß ", "новый ё й ", "がぱ゙カタ ", "東京都 ", "한국어 ", "ภาษาไทย ", "كتابٌ ", "שָׁלוֹם ", "हिन्दी ", "தமிழ் ",
           "ελλάς ", "C++ C# .NET a_b ", "ﬁＡ² ", "e\u0301 и\u0306 ", "İı ", "🍎👍🏽 "]
letters = st.sampled_from(SCRIPTS).flatmap(lambda script: st.text(alphabet=script, max_size=12))
texts = st.lists(letters, max_size=6).map(" ".join) | st.text(alphabet=st.characters(exclude_categories=["Cs"]))


def holds_a_letter(chunk):
    """By Unicode's own categories: a letter that is no mere modifier, or a digit."""
    return any(unicodedata.category(sign) in ("Lu", "Ll", "Lt", "Lo", "Nd") for sign in chunk)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(texts.filter(holds_a_letter), min_size=1, max_size=4,
                      unique_by=lambda text: tuple(text.replace("\0", " ").split())))
def test_any_text_is_found_by_any_of_its_words(tmp_path_factory, texts):
    path = build_index((Document(str(at), f"title\n\n{text}\n\nrest", "text", "u:") for at, text in enumerate(texts)),
                       tmp_path_factory.mktemp("i") / "index.sqlite")
    opened = PassageIndex(path)
    for at, text in enumerate(texts):
        for chunk in filter(holds_a_letter, text.split()):
            assert any(passage.id.startswith(f"{at}:") for passage in opened.search(chunk, 99)), (chunk, words(chunk))


@settings(max_examples=200, deadline=None)
@given(texts)
def test_all_spellings_of_a_text_have_the_same_words(text):
    """Composed or decomposed, with compatibility forms or without, in any case; and folding again changes nothing."""
    expected = words(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words(unicodedata.normalize(form, text)) == expected
    assert words(text.casefold()) == expected
    assert folded(folded(text)) == folded(text)
    assert words(" ".join(expected)) == expected


def test_stems_are_porters():
    """From the article: Porter, "An algorithm for suffix stripping" (1980)."""
    examples = {"caresses": "caress", "ponies": "poni", "cats": "cat", "agreed": "agre", "plastered": "plaster",
                "motoring": "motor", "hopping": "hop", "falling": "fall",
                "relational": "relat", "conditional": "condit", "vietnamization": "vietnam",
                "formalize": "formal", "adjustment": "adjust", "controll": "control"}
    assert {word: stem(word) for word in examples} == examples
    assert content_words("He was joining the joined joins") == ["join"] * 3


def test_what_is_no_english_word_has_no_english_ending():
    """Neither with a digit or a sign in it, nor in other letters, nor of two letters."""
    for word in ("mp3s", "x86ing", "łodzies", "c++", "c#", "is", "as", "новыйs", "東京s", ""):
        assert stem(word) == word
    assert stem("its") == "it" and stem("agreed") == "agre"


@pytest.mark.parametrize("text, wanted", [
    ("a_b os.path", ["a", "b", "os", "path"]), ("C++ c# f#m x++y", ["c++", "c#", "f", "m", "x++", "y"]),
    ("É c# x", ["e", "c#", "x"]), ("東京都 é", ["東", "京", "都", "e"]), ("กา", ["ก", "า"]), ("ก็ข", ["ก็", "ข"]),
    ("", []), ("한국 a1 ２", ["한", "국", "a1", "2"])])
def test_words_by_hand(text, wanted):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in wanted]


def test_words_that_nothing_parts_are_a_run():
    assert list(runs("Go 東京都 now")) == [("go",), ("東", "京", "都"), ("now",)]
    assert list(runs("a b")) == [("a",), ("b",)]


def test_names_in_pieces():
    """Of dotted ones each end; of humped ones each hump."""
    assert list(joined("os.path.join")) == ["ospathjoin0", "pathjoin0"] and list(joined("os")) == []
    assert list(joined("a_b.c_d")) == ["abcd0"] and list(joined("__x.__.y")) == ["xy0"]
    assert list(humps("the TemporaryDirectory of HTTPServer, parseInt and os.ENOENT")) == [
        "temporary", "directory", "http", "server", "parse", "int"]
    assert list(humps("Only plain Words")) == []


def test_what_an_index_cannot_part_is_parted_before():
    assert parted("plain Text, as_is") == "plain Text, as_is"
    assert parted("C++ x") == "c++ x" and parted("a C#.") == "a c#" and parted("Été東京") == "ete 東 京"
