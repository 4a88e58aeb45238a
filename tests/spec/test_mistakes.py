"""Every mistake in a spec is one line with its place, its path and what to do; all of a file come at once."""

from __future__ import annotations

import pytest

from tryplicity import PluginFault, UserError
from tryplicity.spec import load_spec, read_yaml
from tryplicity.spec.loader import parse_yaml

#: what is mistaken: (a text of the valid spec, what replaces it, place and path, a part of the message)
CASES = {
    "key misspelt at the top": ("linear: {type: linear}", "liner: {type: linear}", "5:1: liner",
        "unknown key (did you mean linear?)"),
    "required key misspelt": ("hidden_size: 64", "hiden_size: 64", "3:1: hiden_size",
        "did you mean hidden_size?"),
    "key unlike any": ("context_length: 128", "context_length: 128\nzzz: 1", "5:1: zzz",
        "(there are: blocks, brain,"),
    "key misspelt in a component": ("heads: 4", "haeds: 4", "17:7: blocks.look.mixer.haeds",
        "did you mean heads?"),
    "key misspelt in training": ("gradient_clip: 0.5", "gradient_clips: 0.5", "36:3: training.gradient_clips",
        "did you mean gradient_clip?"),
    "wrong type": ("hidden_size: 64", "hidden_size: wide", "3:14: hidden_size",
        "expected a whole number from 1 to 1,048,576, got the text 'wide'"),
    "number in quotes": ("heads: 4", 'heads: "4"', "17:14: blocks.look.mixer.heads",
        "a whole number of at least 1, got the text '4'"),
    "fraction where a whole number is wanted": ("state_size: 8", "state_size: 8.5",
        "9:39: blocks.recall.mixer.state_size", "a whole number of at least 1"),
    "true where a number is wanted": ("vocab_size: 512", "vocab_size: true", "2:13: vocab_size",
        "expected a whole number from 262 to 1,048,576, got true"),
    "yes is not true": ("name: small", "name: small\ntied_embeddings: yes", "2:18: tied_embeddings",
        "expected true or false, got the text 'yes'"),
    "list where a mapping is wanted": ("{total_parameters: 1e6}", "[1e6]", "38:9: expect",
        "expected a mapping, got a list of 1"),
    "mapping where a list is wanted": ("heads: [{type: ahead, tokens: 3}]", "heads: {type: ahead}",
        "30:8: heads", "expected a list, got a mapping"),
    "null where a value is needed": ("name: small", "name:", "1:6: name",
        "expected text of at least 1 character(s), got nothing"),
    "a number where a component is needed": ("mixer: memory", "mixer: 3", "24:12: layers[2].mixer",
        "expected the name of a mixer, or a mapping with type and options, got 3 (there are: atten"),
    "a block of nothing": ("mixer: memory", "mixer:", "24:5: layers[2]",
        "a block needs a mixer, a feed_forward, or both; add one"),
    "negative size": ("hidden_size: 64", "hidden_size: -64", "3:14: hidden_size", "from 1 to 1,048,576, got -64"),
    "zero": ("tokens: 3", "tokens: 0", "30:31: heads[0].tokens", "a whole number of at least 1, got 0"),
    "number out of range": ("gradient_clip: 0.5", "gradient_clip: 0", "36:18: training.gradient_clip",
        "expected a number from 1e-30 to 1e+06, got 0"),
    "not a number": ("gradient_clip: 0.5", "gradient_clip: .nan", "36:18: training.gradient_clip", "finite"),
    "above a range": ("{until: 1, judge", "{until: 1.5, judge", "32:55: brain[0].stages[1].until",
        "expected a number greater than 0 and of at most 1, got 1.5"),
    "optional and still wrong": ("heads: 4", "window: -3", "17:15: blocks.look.mixer.window",
        "expected a whole number of at least 1 or null, got -3"),
    "not one of the choices": ("heads: 4", "rotary: ful", "17:15: blocks.look.mixer.rotary",
        "expected one of full, half, none, got the text 'ful' (did you mean full?)"),
    "unknown component": ("type: attention", "type: atention", "16:13: blocks.look.mixer.type",
        "no mixer is called 'atention' (did you mean attention?)"),
    "unknown component by its name": ("mixer: memory", "mixer: mamba", "24:12: layers[2].mixer",
        "no mixer is called 'mamba'"),
    "unknown component of a family inside": ("{type: inhibition,", "{type: inhibitoin,",
                                             "13:22: blocks.recall.feed_forward.router.type",
        "no router is called 'inhibitoin' (did you mean inhibition?)"),
    "component of another family": ("mixer: memory", "mixer: moe", "24:12: layers[2].mixer",
        "no mixer is called 'moe' (there are: attention, memory)"),
    "type missing": ("mixer: {type: memory, state_size: 8}", "mixer: {state_size: 8}",
                     "9:5: blocks.recall.mixer",
        "type is missing; it says which mixer this is (there are: attention, memory)"),
    "type misspelt": ("{type: inhibition,", "{typ: inhibition,",
        "13:16: blocks.recall.feed_forward.router.typ", "unknown key (did you mean type?)"),
    "type is not a name": ("type: attention", "type: 3", "16:13: blocks.look.mixer.type",
        "expected the name of a mixer, got 3"),
    "required option missing": ("      inner_size: 32\n", "", "10:5: blocks.recall.feed_forward",
        "inner_size is missing; add it (a whole number of at least 1)"),
    "required key missing": ("context_length: 128\n", "", "1:1", "context_length is missing; add it"),
    "mixer missing": ("  - mixer: memory", "  - norm: rmsnorm", "24:5: layers[2]",
        "a block needs a mixer, a feed_forward, or both; add one"),
    "heads that do not divide": ("heads: 4", "heads: 5", "17:14: blocks.look.mixer.heads",
        "hidden_size 64 does not divide by 5 heads; 4 would do"),
    "unknown block": ("of: recall}", "of: recal}", "22:26: layers[0].of[0].of",
        "no block is called 'recal' (did you mean recall?)"),
    "a layer that is none": ("  - mixer: memory", "  - 3", "24:5: layers[2]",
        "expected the name of a block, a block, "),
    "repeat 0": ("repeat: 3", "repeat: 0", "22:19: layers[0].of[0].repeat",
        "a whole number from 1 to 1,048,576, got 0"),
    "repeat of nothing": ("{repeat: 3, of: recall}", "{repeat: 3}", "22:10: layers[0].of[0]",
        "of is missing"),
    "repeat with a key too many": ("{repeat: 3, of", "{repeat: 3, off: 1, of", "22:22: layers[0].of[0].off",
        "unknown key (did you mean of?)"),
    "empty pattern": ("pattern: [recall, look]", "pattern: []", "23:15: layers[1].pattern",
        "expected a list of at least 1 element(s), got a list of 0"),
    "too many layers": ("repeat: 2", "repeat: 100000", "21:3: layers", "more than 1000 layers"),
    "override beyond the layers": ('"1-2"', '"1-20"', "27:3: overrides.1-20", "of the layers 0 to 11"),
    "override that is no range": ("  11:", "  last:", "28:3: overrides.last", "expected a layer, or a range"),
    "override with a wrong option": ("state_size: 4}}", "state_sise: 4}}",
        "27:19: overrides.1-2.mixer.state_sise", "did you mean state_size?"),
    "the same head twice": ("tokens: 3}]", "tokens: 3}, ahead]", "30:35: heads[1]",
        "stands already at heads[0]"),
    "expect with a wrong key": ("expect: {total_parameters", "expect: {total_parameter",
        "38:10: expect.total_parameter", "did you mean total_parameters?"),
    "expect out of range": ("total_parameters: 1e6", "within: 2", "38:18: expect.within",
        "expected a number greater than 0 and less than 1, got 2"),
    "duplicate key": ("hidden_size: 64", "hidden_size: 64\nhidden_size: 32", "4:1: hidden_size",
        "duplicate key: it stands already on line 3"),
    "key that is no text": ("name: small", "name: small\n1.5: x", "2:1: ", "a key must be text"),
    "tab": ("    mixer:\n", "\tmixer:\n", "15:1",
        "not valid YAML: found character '\\t' that cannot start any token while scanning for the next token; "
        "indent with spaces, not tabs"),
    "bracket left open": ("of: [{repeat: 3, of: recall}, look]", "of: [{repeat: 3, of: recall}, look", "23:5",
        "begun on line 22; close the bracket"),
    "bad indentation": ("      heads: 4", "     heads: 4", "17:6", "check the indentation"),
    "quote left open": ("name: small", "name: 'small", "39:1", "close the quotes"),
    "unknown anchor": ("*experts", "*expert", "18:19", "write the anchor (&name) above"),
    "forbidden character": ("name: small", "name: sm\x01all", "1:9",
        "forbidden character '\\x01'; remove it"),
    "alias of the wrong thing": ("mixer: memory", "mixer: *experts", "11:13: layers[2].mixer.type",
        "no mixer is called 'moe' (there are: attention, memory) (through the alias on line 24)"),
}


def mistakes_of(text: str, registry) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(text, "s.yaml"), registry)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("old", "new", "where", "message"), CASES.values(), ids=CASES)
def test_a_mistake_is_one_line_with_place_path_and_remedy(old, new, where, message, valid, registry):
    assert valid.count(old) == 1
    (line,) = mistakes_of(valid.replace(old, new), registry)
    assert line.startswith(f"s.yaml:{where}"), line
    assert message in line


def test_ten_mistakes_in_one_file_come_together_in_its_order(valid, registry):
    text = valid
    for old, new in [("vocab_size: 512", "vocab_size: 12"),
                     ("linear: {type: linear}", "liner: {type: linear}"),
                     ("state_size: 8", "state_size: big"), ("type: inhibition", "type: inhibitoin"),
                     ("heads: 4", "heads: 5"), ("repeat: 3", "repeat: 0"), ("mixer: memory", "mixer: mamba"),
                     ("tokens: 3", "tokens: -3"), ("{until: 1,", "{untill: 1,"), ("gradient_clip: 0.5",
                                                                                 "gradient_clip: yes")]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    lines = mistakes_of(text, registry)
    paths = [line.split(": ")[1] for line in lines]
    assert paths == ["vocab_size", "liner", "blocks.recall.mixer.state_size",
                     "blocks.recall.feed_forward.router.type", "blocks.look.mixer.heads",
                     "layers[0].of[0].repeat", "layers[2].mixer", "heads[0].tokens",
                     "brain[0].stages[1].untill", "training.gradient_clip"]
    numbers = [int(line.split(":")[1]) for line in lines]
    assert numbers == sorted(numbers)


def test_a_mistake_in_a_block_used_often_and_behind_an_alias_stands_once(valid, registry):
    assert len(mistakes_of(valid.replace("inner_size: 32", "inner_size: 0"), registry)) == 1
    # the same with a mistake that only the component's own check can see
    (line,) = mistakes_of(valid.replace("inner_size: 32", "inner_size: 3200"), registry)
    assert line == ("s.yaml:12:19: blocks.recall.feed_forward.inner_size: more than eight times hidden_size; "
                    "at most 512")


def test_a_missing_option_behind_an_alias_stands_once(valid, registry):
    assert len(mistakes_of(valid.replace("      inner_size: 32\n", ""), registry)) == 1


def test_a_layers_own_mistake_is_not_told_again_for_its_override(valid, registry):
    text = valid.replace("state_size: 8}", "state_size: 8, decay: 2}")
    (line,) = mistakes_of(text, registry)
    assert "blocks.recall.mixer.decay" in line
    both = mistakes_of(text.replace("state_size: 4", "state_size: -4"), registry)
    assert [line.split(": ")[1] for line in both] == ["blocks.recall.mixer.decay",
                                                      "overrides.1-2.mixer.state_size"]


def test_a_misspelt_blocks_key_is_the_only_mistake_told(valid, registry):
    (line,) = mistakes_of(valid.replace("blocks:\n", "bloks:\n"), registry)
    assert "bloks: unknown key (did you mean blocks?)" in line


def test_an_override_may_make_two_right_options_wrong_together(valid, registry):
    text = valid.replace('"1-2": {mixer: {state_size: 4}}', '"3": {mixer: {heads: 7}}')
    (line,) = mistakes_of(text, registry)
    assert line.startswith("s.yaml:27:24: overrides.3.mixer.heads: hidden_size 64 does not divide by 7 heads")


@pytest.mark.parametrize("sizes", ["hidden_size: x", "context_length: 0"])
def test_without_sizes_the_rest_is_still_checked(valid, registry, sizes):
    key = sizes.partition(":")[0]
    text = "\n".join(sizes if line.startswith(key) else line for line in valid.splitlines())
    lines = mistakes_of(text.replace("tokens: 3", "tokens: 0"), registry)
    assert len(lines) == 2


def test_merged_keys_are_placed_where_they_were_written(valid, registry):
    text = valid.replace("  look:\n    mixer:\n", "  look:\n    mixer:\n      <<: {window: 0, heads: 3}\n")
    (line,) = mistakes_of(text, registry)  # its own `heads: 4` goes before the inherited one
    assert line.startswith("s.yaml:16:20: blocks.look.mixer.window: ")


def test_faults_of_a_plugin_found_while_checking_name_it(valid, registry, monkeypatch):
    def check(config, site):
        raise ZeroDivisionError("oh")

    component = registry.get("mixer", "memory")
    monkeypatch.setattr(component, "check", check)
    with pytest.raises(PluginFault) as caught:  # nothing is wrong with the file
        load_spec(parse_yaml(valid, "s.yaml"), registry)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("s.yaml:9:12: blocks.recall.mixer: mixer 'memory' of plugin tests failed: "
                               "ZeroDivisionError: oh (spec/small_components.py, line ")
    assert "; mend it, or choose another mixer" in lines[0]
    lines = mistakes_of(valid.replace("hidden_size: 64", "hiden_size: 64", 1).replace("heads: 4", "haeds: 4"), registry)
    assert any("did you mean heads?" in line for line in lines)  # with mistakes of the file, all are told as such


@pytest.mark.parametrize(("content", "message"), [
    (None, "there is no such file"),
    (b"", ":1:1: expected a mapping of keys to values; the file is empty"),
    (b"# only a comment\n", "the file is empty"),
    (b"just text", "expected a mapping of keys to values; got the text 'just text'"),
    (b"- a\n- b\n", "expected a mapping of keys to values; got a list of 2"),
    (b"name: x\nvocab\xff: 3\n", ":2:6: not UTF-8 text (byte 0xff); save it as UTF-8"),
    (b"\x00\x01\x02", "forbidden character"),
    (b"a: " + b"[" * 1000, "nested too deeply"),
    (b"a: &a [*a]", "nested too deeply, or an anchor that holds itself"),
    (b"a: &a [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdefg"),
        "more than 100000"),
    (b"a: " + b"9" * 5000, "is not a value of the kind"),
    (b"a: 1\n---\nb: 2\n", "keep one document in a file"),
    (b"a: !!python/object:os.system x\n", "not valid YAML: could not determine a constructor"),
    (b"? [a]\n: 1\n", "a key must be text"),
    (b"<<: 3\n", "<<: must be given a mapping to inherit from"),
])
def test_a_file_that_cannot_be_read_says_why(tmp_path, content, message):
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(UserError, match="this is a folder"):
        read_yaml(tmp_path)


# --- --set ---

@pytest.mark.parametrize(("setting", "line"), [
    ("hidden_size=-1", "--set hidden_size=-1: hidden_size: expected a whole number from 1 to 1,048,576, got -1"),
    ("blocks.look.mixer.haeds=2", "--set blocks.look.mixer.haeds=2: blocks.look.mixer.haeds: unknown key"),
    ("blocks.look.mixer={type: attention, heads: 5}",
     "blocks.look.mixer.heads: hidden_size 64 does not divide"),
    ("layers.2.mixer=mamba", "--set layers.2.mixer=mamba: layers[2].mixer: no mixer is called 'mamba'"),
    ("layers[2].mixer=mamba", "layers[2].mixer: no mixer is called 'mamba'"),
    ("blocks.lok.mixer.heads=2", "there is no blocks.lok (did you mean look?)"),
    ("blocks.new.feed_forward=moe", "there is no blocks.new (there are: look, recall)"),
    ("blocks.new={norm: rmsnorm}", "--set blocks.new={norm: rmsnorm}: blocks.new: a block needs a mixer, a feed_f"),
    ("layers.7=look", "--set layers.7=look: layers is a list with entries 0 to 2; 3 appends"),
    ("layers.x.mixer=look", "layers is a list with entries 0 to 2"),
    ("linear.type.deep=3", "linear.type is the text 'linear', with nothing inside; set it as a whole"),
    ("hidden_size", "expected path=value, such as --set hidden_size=512"),
    ("=3", "expected path=value"),
    ("hidden_size=[", "'[' is not a valid YAML value"),
    ("heads.0={type: ahead, type: ahead}", "is not a valid YAML value"),
])
def test_a_mistake_on_the_command_line_names_the_setting(valid, registry, setting, line):
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(valid, "s.yaml"), registry, [setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert line in str(caught.value)


def test_all_settings_at_fault_are_told_at_once(valid, registry):
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(valid, "s.yaml"), registry, ["a", "layers.9=look", "hidden_size=32"])
    assert len(str(caught.value).splitlines()) == 2


def test_mistakes_of_the_file_and_of_settings_come_together(valid, registry):
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(valid.replace("heads: 4", "heads: x"), "s.yaml"), registry, ["vocab_size=1"])
    first, second = str(caught.value).splitlines()
    assert first.startswith("s.yaml:17:14") and second.startswith("--set vocab_size=1: vocab_size: ")
