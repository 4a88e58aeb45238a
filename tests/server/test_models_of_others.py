"""What the page asks of a small model that brought its own template."""

from __future__ import annotations

import transformers

from tests.exchange.models import save, sizes
from tryplicity import Passage, load_plugins
from tryplicity.exchange.importing import import_model
from tryplicity.inference.engine import Engine
from tryplicity.server.ask import AskBody, Turn
from tryplicity.server.conversations import Conversation

REGISTRY = load_plugins().registry
LONG = Passage("a", "os.path.join", "u:a", "Paths are joined by join. " + "Nothing else here is of use. " * 40, 2.0)


def test_the_nearest_sentences_and_last_what_to_do(tmp_path):
    save(transformers.LlamaConfig(**sizes(max_position_embeddings=4096)), tmp_path / "there")
    import_model(tmp_path / "there", tmp_path / "run", REGISTRY)
    engine = Engine.load(tmp_path / "run", REGISTRY, weights="int8")
    turn = Turn(Conversation(), AskBody(content="How are paths joined?", search=True), ["content"])
    request = turn.request(engine, [LONG], 16)
    asked = engine.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
    own = Turn(Conversation(), AskBody(content="Paths?", sampling={"repetition_penalty": 1.2}), ["content"])
    assert request.sampling.repetition_penalty == 1.0  # it is to repeat its sources
    assert own.request(engine, None, 16).sampling.repetition_penalty == 1.2
    engine.close()
    assert turn.answer.settings["passages"] == 1 and "[user] Sources:" in asked
    assert "Paths are joined by join." in asked and asked.count("Nothing else") < 20
    assert asked.rstrip().endswith("name the source like [1].</s>\n[assistant]")
