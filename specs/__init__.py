"""YAML files installed with the package."""
