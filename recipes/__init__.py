"""Recipes of corpora; installed as tryplicity_recipes, so that `tryplicity data download web-40gb` finds them."""
