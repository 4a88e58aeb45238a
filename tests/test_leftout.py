"""What is left out is counted and said in one form."""

from tryplicity import LeftOut


def test_nothing_left_out_says_nothing():
    assert not LeftOut("files") and str(LeftOut("files")) == ""


def test_the_most_frequent_reason_first_with_an_example():
    left = LeftOut("files")
    left.add("not UTF-8", "old.txt")
    for name in ("setup.py", "b.py", "c.py"):
        left.add("of another kind (.py)", name)
    assert str(left) == "left out 4 files: 3 of another kind (.py) (setup.py, b.py, c.py), 1 not UTF-8 (old.txt)"
    assert left.as_dict() == {"of another kind (.py)": 3, "not UTF-8": 1} and left.total == 4
    left.add("of another kind (.py)", "d.py")
    assert "4 of another kind (.py) (setup.py, b.py, c.py, ...)" in str(left)


def test_what_comes_further_on_is_counted_with_it_and_the_first_places_stay():
    left, more = LeftOut("rows", {"bad": 2}, {"bad": ["1", "5"]}), LeftOut("rows")
    for place in ("7", "9"):
        more.add("bad", place)
    more.add("empty", "8")
    left.update(more)
    assert left.counts == {"bad": 4, "empty": 1} and left.examples == {"bad": ["1", "5", "7"], "empty": ["8"]}
    assert LeftOut.of("rows", left.as_dict(), left.examples) == left
    assert LeftOut("rows", {"bad": 2}, {"bad": "1"}).examples == {"bad": ["1"]}  # as files of before have it


def test_one_is_singular_and_thousands_are_parted():
    one, many = LeftOut("rows"), LeftOut.of("rows", {"without text": 12345})
    one.add("without text")
    assert str(one) == "left out 1 row: 1 without text"
    assert str(many) == "left out 12,345 rows: 12,345 without text"
