"""Recipes as people write them, and their mistakes."""

import pytest

from tryplicity.corpus import load_recipe
from tryplicity.errors import UserError
from tryplicity.spec.installed import installed_files


@pytest.mark.parametrize("name", sorted(installed_files("recipe")))
def test_every_installed_recipe_is_right(registry, name):
    recipe = load_recipe(name, registry)
    assert recipe.name == name and len(set(recipe.names())) == len(recipe.sources)
    assert sum(recipe.budgets()) == recipe.bytes


def test_the_large_recipe_has_the_shares_it_is_meant_to_have(registry):
    recipe = load_recipe("web-40gb", registry)
    gigabytes = {name: size / 1e9 for name, size in zip(recipe.names(), recipe.budgets(), strict=True)}
    assert gigabytes == {"fineweb-edu": 16, "cosmopedia": 5, "wikipedia": 6, "openwebmath": 3, "codeparrot": 4,
                         "pg19": 3, "pes2o": 3}


def test_budgets_are_whole_bytes_that_add_up(registry, recipe_file):
    path = recipe_file(size="100", more="")
    text = path.read_text(encoding="utf-8").replace("judges:", "  - {name: b, source: {type: files, path: texts}}\n"
                                                    "  - {name: c, source: {type: files, path: texts}}\njudges:")
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path, registry).budgets() == [33, 34, 33]


@pytest.mark.parametrize(("wrong", "said"), [
    ({"judges": "[{judge: statistica}]"}, "did you mean statistical"),
    ({"judges": "[{judge: statistical, keep_at: 1, keep_top: 0.3}]"}, "give one of them"),
    ({"judges": "[{judge: statistical, keep_top: 0}]"}, "nothing would ever be kept"),
    ({"more": "votes: 2\n"}, "2 of a panel of 1; at most 1"),
    ({"size": "-4"}, "bytes"),
    ({"more": "juges: []\n"}, "did you mean judges"),
])
def test_mistakes_have_a_place_and_a_remedy(registry, recipe_file, wrong, said):
    path = recipe_file(**wrong)
    with pytest.raises(UserError) as error:
        load_recipe(path, registry)
    assert str(error.value).startswith(f"{path}:") and said in str(error.value)


def test_a_source_that_is_not_there_and_one_that_is_there_twice(registry, recipe_file):
    path = recipe_file()
    path.write_text(path.read_text(encoding="utf-8").replace("path: texts", "path: nowhere"), encoding="utf-8")
    load_recipe(path, registry)  # what is in it is read when it is downloaded
    text = path.read_text(encoding="utf-8").replace("judges:", "  - {name: stories, source: python-docs}\njudges:")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="'stories' is there already"):
        load_recipe(path, registry)


def test_a_spec_is_no_recipe_and_a_setting_changes_one(registry, recipe_file):
    with pytest.raises(UserError, match="this is a spec, and a recipe of a corpus is wanted here"):
        load_recipe("tiny", registry)
    assert load_recipe(recipe_file(), registry, ["bytes=5e6", "sources[0].share=3"]).sources[0].share == 3
