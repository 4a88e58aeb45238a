"""From a recipe to a corpus on the disk: downloaded, freed of duplicates, judged. Loads no torch by itself."""

from tryplicity.corpus.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
