"""Whatever a model would rather say, the text is JSON of the schema."""

import json

import jsonschema
import pytest

from tryplicity.errors import UserError
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.grammar import Grammars
from tryplicity.inference.sampler import Sampling

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
    ({"enum": [{1, 2}]}, "schema: ")])
def test_a_schema_that_cannot_be_followed_is_refused(engine, schema, message):
    with pytest.raises(UserError, match=message):
        engine.submit(Request((2,), Sampling(), 5, schema=schema), print)


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
