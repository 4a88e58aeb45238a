"""Whatever a model would rather say, the text is JSON of the schema."""

import functools
import json
import math
import random
import re

import jsonschema
import pytest

from tryplicity.errors import UserError
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.grammar import Grammars
from tryplicity.inference.sampler import Sampling
from tryplicity.inference.text import token_bytes

SCHEMAS = [
    {"type": "object", "properties": {"answer": {"type": "boolean"}, "mark": {"enum": ["good", "bad"]}},
     "required": ["answer", "mark"], "additionalProperties": False},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
    {"type": "string", "maxLength": 6},
    {"$defs": {"leaf": {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"],
                        "additionalProperties": False}},
     "type": "object", "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
     "required": ["left", "right"], "additionalProperties": False},
]


@pytest.fixture(scope="module")
def engine(packed_model, tokenizer):
    engine = Engine(packed_model, tokenizer, slots=3)
    yield engine
    engine.close()


def write(engine, schema, sampling, tokens=120, **options):
    pieces = list(engine.generate(Request((2, 40, 41), sampling, tokens, schema=schema, **options)))
    return "".join(piece.text for piece in pieces), pieces[-1].finish


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=2.0, seed=1),
                                      Sampling(temperature=1.0, top_p=0.5, presence_penalty=1.0, seed=2)])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_text_is_of_the_schema(engine, schema, sampling):
    text, finish = write(engine, schema, sampling)
    assert finish == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_without_it_the_model_writes_no_json(engine):
    text, _ = write(engine, None, Sampling(temperature=0), tokens=20)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_the_end_of_the_budget_inside_is_told(engine):
    text, finish = write(engine, SCHEMAS[0], Sampling(temperature=0), tokens=4)
    assert finish == "length" and text.startswith('{"') and not text.endswith("}")


def test_others_beside_it_are_free_and_undisturbed(engine, packed_model, plain):
    free = Request((2, 50, 51), Sampling(temperature=1.0, seed=5), 20, end_tokens=frozenset())
    heard, texts = [], {}
    other = engine.submit(free, lambda piece: heard.extend(token.id for token in piece.tokens))
    generations = []
    for number in range(2):
        request = Request((2, 60), Sampling(temperature=1.0, seed=6), 120, schema=SCHEMAS[0])
        generations.append(engine.submit(request, lambda piece, n=number: texts.update(
            {n: texts.get(n, "") + piece.text})))
    assert other.wait(60) and all(generation.wait(60) for generation in generations)
    assert heard == plain(packed_model, free)
    assert texts[0] == texts[1]
    jsonschema.validate(json.loads(texts[0]), SCHEMAS[0])


def test_with_guesses_ahead_it_is_the_same_text(engine, packed_model, tokenizer):
    guessing = Engine(packed_model, tokenizer, speculative=True)
    sampling = Sampling(temperature=1.0, seed=3)
    assert write(guessing, SCHEMAS[0], sampling) == write(engine, SCHEMAS[0], sampling)


@pytest.mark.parametrize("schema, message", [
    ({"type": "objct"}, "schema: Invalid type: objct"),
    ({"type": "array", "uniqueItems": True}, "schema: Unimplemented keys"),
    ({"$ref": "#/$defs/missing"}, "schema: "),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "schema: "),
    ({"enum": [{1, 2}]}, "schema: "),
    ({"type": "object", "properties": {"age": {"type": "integer"}}, "patternProperties": {"^a": {"minimum": 500}}},
     r"schema: patternProperties '\^a' is for the property 'age' too"),
    ({"items": {"allOf": [{"properties": {"ab": {"type": "integer"}}}, {"$ref": "#/$defs/x"}]},
      "$defs": {"x": {"patternProperties": {"b$": {"minimum": 5}}}}}, r"schema.items: patternProperties 'b\$'"),
    ({"const": 2**53 + 1}, r"schema.const: 9007199254740993 is beyond 2\^53"),
    ({"const": {"a": [1, -2**63 + 1]}}, "schema.const: .* is beyond"),  # ends the process if it is let in
    ({"properties": {"n": {"type": "integer", "minimum": 2**70}}}, "schema.properties.n.minimum: .* is beyond"),
    ({"enum": [1e300]}, "schema.enum: .* is beyond"), ({"maximum": math.inf}, "schema.maximum: inf is beyond"),
    (functools.reduce(lambda inner, _: {"items": inner}, range(5000), {}), "is deeper than 64 levels"),
    (functools.reduce(lambda inner, _: [inner], range(5000), 1), "schema"),
    ({"enum": [functools.reduce(lambda inner, _: [inner], range(5000), 1)]}, "is deeper than 64 levels"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}], "type": "objct"}}}, "schema: ")])
def test_a_schema_that_cannot_be_followed_is_refused(engine, schema, message):
    with pytest.raises(UserError, match=message):
        engine.submit(Request((2,), Sampling(), 5, schema=schema), print)


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "patternProperties": {"^b": {"type": "string"}}},
    {"type": "object", "properties": {"x": {"properties": {"a": {"type": "null"}}}}, "patternProperties": {"^a": {}}},
    {"const": 2**53}, {"type": "integer", "minimum": -2**53}, {"default": 2**70, "type": "null"},
    {"properties": {"const": {"type": "integer"}, "enum": {"type": "null"}, "minimum": {"maximum": 3}}}])
def test_a_schema_that_can_be_followed_is_not_refused(tokenizer, schema):
    Grammars(tokenizer).json(schema)


class Digits:
    """A sampler that would rather write digits than anything else."""

    def __init__(self, tokenizer):
        self.texts = token_bytes(tokenizer)

    def __call__(self, allowed_V, dice):
        allowed = allowed_V.nonzero()[:, 0].tolist()
        liked = [token for token in allowed if self.texts[token][:1] in b"0123456789.eE" and self.texts[token]]
        return dice.choice(liked or allowed)


@pytest.mark.parametrize("schema", [
    {"type": "number"}, {"type": "integer"}, {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    {"type": "object", "properties": {"a": {"type": "number", "minimum": 0.5}, "n": {"type": "integer"}},
     "required": ["a", "n"], "additionalProperties": False}, {"const": 0.12345678901234567},
    {"type": "array", "prefixItems": [{"type": "string", "pattern": "^[0-9]{40}$"}, {"type": "integer"}], "minItems": 2,
     "items": False}])
def test_a_number_ends_in_time(tokenizer, schema):
    """And digits in a string, or such as the schema wants, go on."""
    grammars, choose = Grammars(tokenizer), Digits(tokenizer)
    for seed in range(20):
        grammar, dice, text = grammars.json(schema), random.Random(seed), b""
        for _ in range(120):
            token = choose(grammar.allowed(), dice)
            if not choose.texts[token]:
                break
            grammar.take(token)
            text += choose.texts[token]
            if grammar.complete:
                break
        else:
            pytest.fail(f"no end: {text.decode()}")
        value = json.loads(text)
        jsonschema.validate(value, schema)
        bare = re.sub(r'"[^"]*"', "", text.decode())
        most = 18 if "const" in schema else 16
        assert all(sum(c.isdigit() for c in number) <= most + ("e" in number.lower())
                   for number in re.findall(r"[0-9.eE+-]+", bare)), bare
        assert "inf" not in json.dumps(value).lower()


def test_a_grammar_allows_just_what_fits(tokenizer):
    grammar = Grammars(tokenizer).json({"enum": [True, None]})
    assert {tokenizer.id_to_token(i)[0] for i in grammar.allowed().nonzero()[:, 0].tolist()} == {"t", "n"}
    for token in tokenizer.encode("null", add_special_tokens=False).ids:
        assert not grammar.complete
        grammar.take(token)
    assert grammar.complete
    broken = Grammars(tokenizer).json({"type": "null"})
    with pytest.raises(UserError, match=r"schema: .*satisfy the grammar"):
        broken.take(tokenizer.token_to_id("x"))


@pytest.mark.parametrize("schema", [
    lambda levels: functools.reduce(lambda inner, _: {"items": inner}, range(levels), {}),
    lambda levels: {"const": functools.reduce(lambda inner, _: [inner], range(levels), 1)},
    lambda levels: {"enum": [functools.reduce(lambda inner, _: {"a": inner}, range(levels - 1), 1)]}])
def test_a_schema_may_be_64_levels_deep(tokenizer, schema):
    grammars = Grammars(tokenizer)
    for levels in (1, 63, 64):
        grammars.json(schema(levels))
    with pytest.raises(UserError, match="is deeper than 64 levels"):
        grammars.json(schema(65))


def test_a_number_has_sixteen_digits_at_most(tokenizer):
    """Counted one after the other, however it is written; a point or an exponent needs one more after it."""
    grammars, texts = Grammars(tokenizer), token_bytes(tokenizer)

    def after(text, *, schema="number"):
        """Which of a digit, a point and an exponent may follow."""
        grammar = grammars.json({"type": schema})
        for sign in text:
            grammar.take(texts.index(sign.encode()))
        allowed_V = grammar.allowed()
        return "".join(sign for sign in "7.e" if allowed_V[texts.index(sign.encode())])

    assert after("1" * 15) == "7.e" and after("1" * 16) == "" and after("-" + "1" * 15) == "7.e"
    assert after("1." + "2" * 14) == "7e" and after("1." + "2" * 15) == ""
    assert after("1" * 15 + ".") == "7" and after("1" * 15 + ".1") == ""
    assert after("1e") == "7" and after("1e5") == "7" and after("1e55") == ""
    assert after("1" * 15, schema="integer") == "7" and after("1" * 16, schema="integer") == ""
