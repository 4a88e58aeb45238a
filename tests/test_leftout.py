"""What is left out is counted and said in one form."""

from tryplicity import LeftOut


def test_nothing_left_out_says_nothing():
    assert not LeftOut("files") and str(LeftOut("files")) == ""


def test_the_most_frequent_reason_first_with_an_example():
    left = LeftOut("files")
    left.add("not UTF-8", "old.txt")
    for name in ("setup.py", "b.py"):
        left.add("of another kind (.py)", name)
    assert str(left) == "left out 3 files: 2 of another kind (.py) (setup.py, ...), 1 not UTF-8 (old.txt)"
    assert left.as_dict() == {"of another kind (.py)": 2, "not UTF-8": 1} and left.total == 3


def test_one_is_singular_and_thousands_are_parted():
    one, many = LeftOut("rows"), LeftOut.of("rows", {"without text": 12345})
    one.add("without text")
    assert str(one) == "left out 1 row: 1 without text"
    assert str(many) == "left out 12,345 rows: 12,345 without text"
