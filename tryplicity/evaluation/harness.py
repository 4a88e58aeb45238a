"""The tasks of the lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), through its model API.

    pip install "tryplicity[lm-eval]"
    tryplicity eval runs/first --tasks arc_easy,my_task --tasks-folder my_tasks

Only this module imports lm_eval. Shapes: B requests, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tryplicity.components import IGNORE
from tryplicity.errors import UserError
from tryplicity.evaluation.score import TOKENS, nats_and_choice
from tryplicity.guard import cause
from tryplicity.inference.engine import Engine
from tryplicity.inference.generation import Request
from tryplicity.inference.sampler import Sampling
from tryplicity.plugins import load_plugins

MOST_NEW = 256  # tokens of an answer where a task says nothing, as the harness's own models have it

Scored = tuple[float, bool]  # the logarithm of a probability; whether greedy decoding would have written it


@register_model("tryplicity")
class TryplicityLM(TemplateLM):
    """A model of this project to the harness: `TryplicityLM(engine)`, or by name with model_args run=FOLDER."""

    def __init__(self, run: Engine | str, device: str | None = None,
                 progress: Callable[[str, int, int], None] = lambda what, done, total: None, **_: Any) -> None:
        """progress: called with what is done, how much of it, and of how much. Raises UserError."""
        super().__init__()
        self.engine = run if isinstance(run, Engine) else Engine.load(run, load_plugins().registry, device or "cpu",
                                                                      ternary=False)
        self.progress = progress
        self.engine.encode("")  # raises where there is no tokenizer
        self.engine.tokenizer.encode_special_tokens = True  # "<|eos|>" in a task's text is text

    @property
    def eot_token_id(self) -> int:
        return self.engine.vocabulary.eos

    @property
    def prefix_token_id(self) -> int:
        return self.engine.vocabulary.bos

    @property
    def tokenizer_name(self) -> str:
        return self.engine.card.weights_hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With <|bos|> in front, as every text in training has it, unless it goes on from another."""
        return self.engine.encode(string)[0 if add_special_tokens is not False else 1:]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              disable_tqdm: bool = True, **_: Any) -> list[Scored]:
        return self.scores([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, each token once: in windows of a context, the first after <|bos|>, the last with as much
        before it as a context holds."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.engine.context_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self.scores(pairs), strict=True):
            totals[number] += logprob
        return totals

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Of the second tokens after the first, in batches of about equal length, the longest first. What lies more
        than a context before the end is not read. Raises UserError where more than a context is to be scored."""
        context = self.engine.context_length
        if longest := max((len(after) for _, after in pairs if len(after) > context), default=0):
            raise UserError(f"a task has a continuation of {longest} tokens, and the context of this model holds "
                            f"{context}; leave the task out")
        rows = [(before + after)[-context - 1:] for before, after in pairs]
        order, found = sorted(range(len(rows)), key=lambda i: -len(rows[i])), {}
        while order:
            size = max(1, TOKENS // max(1, len(rows[order[0]]) - 1))
            batch, order = order[:size], order[size:]
            width = max(1, len(rows[batch[0]]) - 1)
            ids_BT = torch.zeros(len(batch), width, dtype=torch.int64)
            targets_BT = torch.full_like(ids_BT, IGNORE)
            docs_BT = torch.ones(len(batch), width, dtype=torch.int32)  # what fills up is a document of its own
            for row, number in enumerate(batch):
                ids, wanted = torch.tensor(rows[number]), len(pairs[number][1])
                ids_BT[row, :len(ids) - 1], docs_BT[row, :len(ids) - 1] = ids[:-1], 0
                targets_BT[row, len(ids) - 1 - wanted:len(ids) - 1] = ids[len(ids) - wanted:]
            nats_BT, chosen_BT = nats_and_choice(self.engine.model, ids_BT, targets_BT, docs_BT)
            logprobs_B = -nats_BT.double().sum(-1)
            greedy_B = (chosen_BT.cpu() | (targets_BT == IGNORE)).all(-1)
            found |= {number: (logprobs_B[row].item(), bool(greedy_B[row])) for row, number in enumerate(batch)}
            self.progress("scoring", len(found), len(rows))
        return [found[number] for number in range(len(rows))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As many texts at once as the engine writes. The end of a prompt that is too long is what is read; an answer
        takes at most half of the context from it."""
        done, texts = 0, []
        with ThreadPoolExecutor(8) as writers:
            for text in writers.map(lambda request: self._text(*request.args), requests):
                texts.append(text)
                done += 1
                self.progress("writing", done, len(requests))
        return texts

    def _text(self, prompt: str, options: dict[str, Any]) -> str:
        until, context = options.get("until") or [], self.engine.context_length
        ids = self.tok_encode(prompt)
        most = min(int(options.get("max_gen_toks", options.get("max_tokens", MOST_NEW))),
                   max(context // 2, context - len(ids)))
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        sampling = Sampling(temperature=temperature, top_k=int(options.get("top_k") or 0),
                            top_p=float(options.get("top_p") or 1.0), seed=0)
        request = Request(tuple(ids[most - context:] if len(ids) + most > context else ids), sampling, most,
                          tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop))
        return "".join(piece.text for piece in self.engine.generate(request))


class _Tasks(TaskManager):
    """What cannot be loaded is said in a line."""

    def load(self, task_list: Any) -> Any:
        try:
            found = super().load(task_list)
        except Exception as error:  # of a YAML file, of a data set, of the network
            raise UserError(f"--tasks: {', '.join(task_list)}: cannot be loaded: {cause(error)}") from None
        if unsafe := [name for name, task in found["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
            raise UserError(f"--tasks: {unsafe[0]} runs code that the model writes; that is not done here")
        return found


def run_tasks(engine: Engine, tasks: Sequence[str], folder: Path | None, limit: int | None,
              progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """The harness's results: {"results": {task: {metric: value}}, "versions", "n-shot", "n-samples", ...}. folder: of
    YAML files with further tasks. limit: documents of each. Raises UserError for a task that is not there."""
    own = None if folder is None else _Tasks(include_path=str(folder), include_defaults=False)
    if own is not None and set(tasks) <= set(own.all_subtasks):
        manager = own  # the harness's own are thousands of files, which take seconds to look through
    else:
        manager = _Tasks(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"--tasks: there is no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and --tasks-folder "
                        "DIR adds your own")
    found = simple_evaluate(TryplicityLM(engine, progress=progress), tasks=list(tasks), limit=limit, log_samples=False,
                            task_manager=manager, bootstrap_iters=1000)
    card = engine.card
    return {"model": {"name": card.name, "format": card.format, "weights": card.weights_hash},
            "lm_eval": version("lm-eval"), "limit": limit,
            "tasks": {name: {key: value for key, value in metrics.items() if key != "alias"}
                      for name, metrics in found["results"].items()},
            "versions": found["versions"], "shots": found["n-shot"], "documents": found.get("n-samples", {})}
