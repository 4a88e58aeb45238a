"""From YAML to a resolved, validated spec. Loads no torch by itself."""

from tryplicity.spec.installed import find_file, installed_files
from tryplicity.spec.layers import BlockSpec
from tryplicity.spec.loader import YamlFile, dump_yaml, parse_value, parse_yaml, read_yaml
from tryplicity.spec.model import Expect, Spec, Training, load_spec, spec_schema
from tryplicity.spec.settings import apply_settings
from tryplicity.spec.sources import source_part, source_value

__all__ = ["BlockSpec", "Expect", "Spec", "Training", "YamlFile", "apply_settings", "dump_yaml", "find_file",
           "installed_files", "load_spec", "parse_value", "parse_yaml", "read_yaml", "source_part", "source_value",
           "spec_schema"]
