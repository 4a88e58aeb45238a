"""A filter by datatrove's executors: on this machine, on a Ray cluster, on a Slurm cluster. Needs the extra
`datatrove`; the blocks are in `blocks`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tryplicity.corpus.filtering import read_corpus
from tryplicity.corpus.steps import raw_shards
from tryplicity.errors import UserError
from tryplicity.files import locked

Executor = Literal["local", "ray", "slurm"]


def filter_with(executor: Executor, folder: Path, registry: Any, tasks: int, options: Mapping[str, Any] | None = None,
                plugin_files: tuple[str, ...] = ()) -> bool:
    """Filter a downloaded corpus: four pipelines, one after another. Shards that are done are passed over. False where
    that goes on elsewhere: a Slurm cluster has got its jobs.

    tasks: how many the shards are divided among. options: of datatrove's executor (partition, time, mem_per_cpu_gb...).
    Raises UserError for a folder that is no downloaded corpus, without datatrove, and for a pipeline that failed.
    """
    read_corpus(folder, registry)
    raw_shards(read_corpus(folder, registry), folder)
    stages = _stages(folder, plugin_files)
    kind = _kind(executor)
    options = dict(options or {})
    if unknown := set(options) - set(inspect.signature(kind).parameters):
        raise UserError(f"--executor-option {', '.join(sorted(unknown))}: datatrove's {kind.__name__} has no such "
                        f"option; it has {', '.join(sorted(inspect.signature(kind).parameters))}")
    with locked(folder / ".lock") as other:
        if other is not None:
            raise UserError(f"{folder}: somebody is at work there ({other}); wait until that ends")
        before = None
        try:
            for name, pipeline, alone in stages:
                # what is done, our own files say: a rank of another number of tasks has other shards
                made = kind(pipeline, tasks=1 if alone else tasks, skip_completed=False,
                            logging_dir=str(folder.absolute() / "work" / "datatrove" / name), **options,
                            **({"depends": before, "job_name": f"filter-{name}"} if executor == "slurm" else {}))
                before = made
                if executor != "slurm":
                    made.run()
            if executor == "slurm":
                before.run()  # and with it those it depends on
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # of a task, or of datatrove, Ray or sbatch, whatever they raise
            where = "" if executor == "slurm" else f" in `{name}`"
            raise UserError(f"datatrove's {executor} executor failed{where} ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:300]}); what is done is kept: see "
                            f"{folder / 'work' / 'datatrove'}") from error
    return executor != "slurm"


def _stages(folder: Path, plugin_files: tuple[str, ...]) -> list[tuple[str, list[Any], bool]]:
    """Name, blocks, and whether one task does it."""
    try:
        from tryplicity.corpus import blocks
    except ImportError:
        raise UserError("--executor: datatrove is not installed; pip install 'tryplicity[datatrove]'") from None
    more = {"plugin_files": plugin_files}
    shardwise = (blocks.Read, blocks.LeaveOutCopies, blocks.LeaveOutLanguages, blocks.Vote, blocks.Write)
    return [("sign", [blocks.Read(folder, "signatures", **more), blocks.Sign(folder, **more)], False),
            ("settle", [blocks.Settle(folder, **more)], True),
            ("judge", [block(folder, **more) for block in shardwise], False),
            ("finish", [blocks.Finish(folder, **more)], True)]


def _kind(executor: Executor) -> type:
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    if executor == "local":
        return LocalPipelineExecutor
    if executor == "slurm":
        return SlurmPipelineExecutor
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray: ray is not installed; pip install 'tryplicity[datatrove]'") from None
    from datatrove.executor import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster that RAY_ADDRESS names, or one of this machine
    return RayPipelineExecutor
