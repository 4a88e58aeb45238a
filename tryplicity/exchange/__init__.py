"""Models of other programs: reading them as runs, and writing runs as theirs."""
