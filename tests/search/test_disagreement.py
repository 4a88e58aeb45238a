"""Each rule that tells a contradiction, by a pair that it alone tells, beside one that it lets pass."""

import pytest

from tryplicity import Passage
from tryplicity.search.citations import check
from tryplicity.search.claims import Claim, Evidence, disagreement, sentences

REASONS = [
    # said; written; why the one cannot rest on the other
    ("It keeps 3 files.", "It keeps 4 files.", "numbers"),
    ("It keeps three files.", "It keeps 3 files.", None),
    ("It keeps files.", "It keeps 3 files.", None),
    ("It waits 1.5 seconds.", "It waits 1,5 seconds.", "numbers"),
    ("The offset is -1.", "The offset is 1.", "numbers"),
    ("Call os.remove for files.", "Call os.unlink for files.", "names"),
    ("Call `remove` for files.", "It can remove files by a call.", None),
    ("The TypeError is raised.", "The error is raised.", "names"),
    ("A file of Windows is read.", "A file is read.", "names"),
    ("The file is not read.", "The file is read.", "negation"),
    ("The file isn't read.", "The file is read.", "negation"),
    ("The file isn\u2019t read.", "The file is read.", "negation"),
    ("The file is not never read.", "The file is read.", None),
    ("No file is read.", "A file is read.", "negation"),
    ("None of the files is read.", "The files are read.", "negation"),
    ("none of the files is read.", "The files are read.", "negation"),
    ("A file is read without buffers.", "A file is read with buffers.", "negation"),
    ("A non-empty file is read.", "An empty file is read.", "negation"),
    ("No non-empty file is read.", "An empty file is not read.", "negation"),
    ("The value None is returned.", "The value None is returned.", None),
    ("None is the value of files.", "The value of files is None.", None),
    ("None keeps files.", "It keeps files and None.", None),
    ("It fails, the file is read.", "It fails and the file is read.", None),
    ("It does not fail, the file is read.", "The file is read.", None),
    ("It is not closed (the file is read).", "The file is read.", None),
    ("It is not closed but the file is read.", "The file is read.", None),
    ("The file is stale unless it is read.", "The file is stale.", None),
    ("The path is kept.", "The path is dropped.", "opposites"),
    ("The path is kept and dropped.", "The path is dropped.", None),
    ("The path is kept.", "The path is found.", None),
    ("The list is kept.", "The dict is kept.", "opposites"),
    ("It uses ignore_errors.", "With ignore_errors, errors are raised as it uses them.", None),
    ("The rows are ordered.", "The rows are unordered.", "opposites"),
    ("The rows are unordered.", "The rows are ordered.", "opposites"),
    ("The rows are invalid.", "The rows are valid.", "opposites"),
    ("The flag is unset.", "The flag is set.", "opposites"),
    ("The unit is read.", "It is read.", None),
    ("It is always read.", "It is read.", "strength"),
    ("It is always read.", "It is read for every file.", None),
    ("Only files are read.", "Files are read.", "strength"),
    ("Files are read.", "Only files are read.", None),
    ("It gives False if equal.", "It gives True if equal, False if different.", "values"),
    ("Files have 3, rows have 4.", "Files have 4, rows have 3.", "values"),
    ("The seconds are 3.", "The seconds are 2, then 3.", "values"),
    ("`os.path`", "os.path", None),
    ("3 keys.", "4 keys and 3 rows.", "values"),
    ("keys 4 rows.", "keys 3 files 4 rows.", None),
    ("If the value is returned, the key is missing.", "If the key is missing, the value is returned.", "condition"),
    ("The value is returned if the key is missing.", "If the key is missing, the value is returned.", None),
    ("If the key is missing, the value is returned.", "The key is missing. The value is returned.", None),
    ("When the value is returned, the key is missing.", "Whenever the key is missing, the value is returned.",
     "condition"),
    ("The child waits for the parent.", "The parent waits for the child.", "order"),
    ("The text is copied from rows to pages.", "The text is copied from pages to rows.", "order"),
    ("The lock is taken by the thread.", "The thread has taken the lock.", None),
    ("The thread is taken by the lock.", "The thread has taken the lock.", "order"),
    ("The lock has the thread taken.", "The lock is taken by the thread.", None),
    ("Through lists it walks.", "It walks lists through.", "order"),
    ("If the child waits for the parent, files stay.", "Files stay if the child waits for the parent.", None),
    ("A path joins a path.", "A path joins a path.", None),
]


@pytest.mark.parametrize("said, written, reason", REASONS)
def test_why_a_sentence_may_not_rest_on_another(said, written, reason):
    assert disagreement(Claim(said), Claim(written)) == reason


TWO = "A mutex is taken by one thread. A mutex is not taken by two threads."


def test_the_sentence_that_shares_most_decides_and_of_several_one_that_agrees():
    """The second holds as much as the first, and agrees."""
    support = Evidence("Locks", TWO).support(Claim("A mutex is not taken by threads."))
    assert (support.reason, support.shared) == (None, {"mutex", "taken", "thread"})
    assert Evidence("", TWO).support(Claim("A mutex is not taken by one thread.")).reason == "negation"
    nothing = Evidence("", "").support(Claim("A mutex is taken."))
    assert (nothing.shared, nothing.reason) == (frozenset(), None)


def test_a_title_holds_names_numbers_and_words_but_says_nothing():
    evidence = Evidence("socket.timeout in Python 3", "It is raised when a read ends late.")
    assert evidence.support(Claim("In 3, socket.timeout is raised.")) == (
        {"3", "socket", "timeout", "rais"}, None)
    assert evidence.support(Claim("In 4, socket.timeout is raised.")).reason == "numbers"
    assert evidence.support(Claim("socket.error is raised.")).reason == "names"
    assert Evidence("Always", "It is raised.").support(Claim("It is always raised.")).reason is None


def test_what_a_sentence_is_about():
    """Its first word that says something; not what any sentence may begin with."""
    assert Claim("The zebra eats grass.").head == "zebra" and Claim("3 zebras eat grass.").head == "3"
    assert Claim("The function eats grass.").head is None and Claim("").head is None
    assert Claim("To zebras goes grass.").head == "zebra"


def test_sentences_of_a_passage_are_lines():
    assert sentences("One is\nhere. (Two) is there!  \"Three\"\n\nfour e.g. five.") == [
        "One is here.", "(Two) is there!", '"Three"', "four e.g. five."]
    assert sentences("") == sentences(" \n\n ") == []


PASSAGE = Passage("p", "", "u:", "The lock is taken by the thread that waits longest of all threads.", 1.0)


@pytest.mark.parametrize("answer, marked", [
    ("The lock is taken by the thread that waits longest", True),
    ("The lock waits longest, taken by zebras", False),
    ("Is the lock taken by the thread that waits longest?", False)])
def test_a_mark_for_what_is_borne_out(answer, marked):
    assert check(answer, [PASSAGE]).supported == marked
