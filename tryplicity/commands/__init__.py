"""The larger commands, one file each; `tryplicity.cli` holds the group and the rest. Loads no torch."""
