"""From YAML to a resolved, validated spec. Loads no torch by itself."""

from tryplicity.spec.loader import (
    YamlFile,
    apply_settings,
    dump_yaml,
    find_file,
    installed_files,
    parse_value,
    parse_yaml,
    read_config,
    read_yaml,
)
from tryplicity.spec.model import BlockSpec, Expect, Spec, Training, load_spec, spec_schema
from tryplicity.spec.sources import source_part, source_value

__all__ = ["BlockSpec", "Expect", "Spec", "Training", "YamlFile", "apply_settings", "dump_yaml", "find_file",
           "installed_files", "load_spec", "parse_value", "parse_yaml", "read_config", "read_yaml",
           "source_part", "source_value", "spec_schema"]
