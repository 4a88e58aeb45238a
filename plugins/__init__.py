"""The project's own layers, brain modules, strategies, optimizers and sources, installed as tryplicity_plugins."""
