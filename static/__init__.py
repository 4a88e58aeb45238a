"""The page, as files; a package so that it is installed."""
