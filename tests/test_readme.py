"""What the README says is so."""

import re
from pathlib import Path

import pytest

from tryplicity.errors import UserError
from tryplicity.spec import load_spec, parse_yaml

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SPEC = re.search(r"```yaml\n(.*?)```", README, re.S).group(1)


def test_its_spec_is_right_and_comes_out_as_expected(registry, tmp_path):
    from tryplicity.builder import build

    (tmp_path / "my.yaml").write_text(SPEC)
    assert build(str(tmp_path / "my.yaml"), "cpu", registry).plan.fits  # `expect` is checked on the way


def test_its_error_messages_are_what_is_printed(registry):
    wrong = SPEC.replace("head_dim: 32}", "head_dim: 33}").replace("activation: spike", "activation: spik")
    with pytest.raises(UserError) as error:
        load_spec(parse_yaml(wrong, "my.yaml"), registry)
    shown = re.findall(r"    error: (my\.yaml.*)", README)
    assert shown == str(error.value).splitlines() and len(shown) == 2
