"""Every device holds a share of everything; a block's weights are gathered while it works."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tryplicity import (
    Count,
    Facts,
    MemoryPlan,
    Parallelism,
    Report,
    UserError,
    finish_plan,
    initialise,
    moments,
    sum_of_squares,
)


class FullyShardedData(Parallelism):
    """torch's `fully_shard` (FSDP2), each block its own unit, resharded after its forward pass.

    In bf16: fp32 shards, bf16 gathered weights and gradients, fp32 reduction, and a reduce-scatter after every
    micro-batch (keeping whole gradients until the last would cost 4 bytes a parameter).
    """

    name = "fsdp"
    order = 30

    @dataclass(frozen=True)
    class Config:
        shards: Count | None = None
        """Ranks that hold one copy of the model among them; the others hold further copies. By default those of one
        machine, so that gathered weights do not pass between machines. 1 on one device: to try it there."""
        reshard_after_forward: bool = True
        """Let go of a block's weights after its forward pass and gather them again for the backward pass."""
        accumulate_locally: bool = False
        """Keep whole gradients until the last micro-batch of a step and scatter them once; by default after each."""
        exact: bool = False
        """One row at a time and gradients summed in fp64: the same rows make the same step to the last bits, however
        ranks and micro-batches divide them. To compare trainings, not for speed; 8 bytes for each of all parameters."""

    def __init__(self, config: Config) -> None:
        self.config, self.row_by_row = config, config.exact

    def place(self, model, world, seed, precision="fp32"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if world.size == 1:
            if self.config.shards != 1:
                raise UserError("fsdp: this process is alone; it needs several ranks: a launcher starts them, or use "
                                "single (shards: 1 goes this way on one device, to try it)")
            world.group()
        shards = self.config.shards or world.local_size
        if world.size % shards:
            raise UserError(f"fsdp: shards {shards} does not divide the {world.size} ranks")
        _see_losses_in_reports()
        # a block gives its streams as a view, and nobody writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        if shards == world.size:
            mesh = init_device_mesh(world.device.type, (shards,), mesh_dim_names=("shards",))
        else:
            mesh = init_device_mesh(world.device.type, (world.size // shards, shards),
                                    mesh_dim_names=("copies", "shards"))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None,
                                      reduce_dtype=torch.float64 if self.config.exact else torch.float32,
                                      cast_forward_inputs=False)

        self.kept_whole = False
        self.units: list[tuple[nn.Module, bool]] = []  # what is gathered at once, and whether it is let go of

        def shard(module: nn.Module, reshard: bool) -> None:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # a sum: who makes the loss divides
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
            self.units.append((module, reshard))

        initialise(model, world.device, seed, lambda block: shard(block, self.config.reshard_after_forward))
        shard(model, False)  # what is outside the blocks, with the table that both ends share
        model.register_forward_hook(self._let_go)
        self.world, self.copies = world, world.size // shards
        return model

    def micro_batch(self, model, last):
        model.set_requires_gradient_sync(last or not (self.config.accumulate_locally or self.config.exact))
        model.set_requires_all_reduce(last)
        return nullcontext()

    def clip_gradients(self, model, max_norm):
        own = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
        norm = (self.world.total([sum_of_squares(own)])[0] / self.copies).sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def whole(self, module, write=False):
        return self._written(module) if write else self._gathered(module)

    @contextmanager
    def _gathered(self, module):
        inside = set(module.modules())
        units = [(unit, reshard) for unit, reshard in self.units if not inside.isdisjoint(self._own_modules(unit))]
        for unit, _ in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        self.kept_whole = True
        try:
            yield
        finally:
            self.kept_whole = False
            for unit, reshard in units:
                unit.set_reshard_after_forward(reshard, recurse=False)
                unit.reshard()

    @contextmanager
    @torch.no_grad()
    def _written(self, module):
        """Not what is gathered for a forward pass: that may be in bf16."""
        from torch.distributed.tensor import distribute_tensor

        shares = {share: nn.Parameter(share.full_tensor(), share.requires_grad) for share in module.parameters()}
        places = [(part, name, share) for part in module.modules() for name, share in part._parameters.items()
                  if share is not None]
        for part, name, share in places:
            part._parameters[name] = shares[share]
        try:
            yield
        finally:
            for part, name, share in places:
                part._parameters[name] = share
        for share, full in shares.items():
            own = distribute_tensor(full.detach(), share.device_mesh, share.placements, src_data_rank=None)
            share.to_local().copy_(own.to_local())

    def _own_modules(self, unit: nn.Module) -> set[nn.Module]:
        """Those whose parameters are gathered with the unit."""
        others = {m for other, _ in self.units if other is not unit and other in set(unit.modules())
                  for m in other.modules()}
        return set(unit.modules()) - others

    def _let_go(self, model: nn.Module, *_) -> None:
        """A forward pass without a backward pass leaves what is outside the blocks whole."""
        if not (torch.is_grad_enabled() or self.kept_whole):
            model.reshard()

    def forget(self, optimizer, parameter, rows):
        from torch.distributed.tensor import distribute_tensor

        own = distribute_tensor(rows.to(parameter.device), parameter.device_mesh, parameter.placements,
                                src_data_rank=None).to_local()
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.to_local()[own] = 0

    def weights(self, model):
        found = {}
        for name, tensor in model.state_dict().items():
            tensor = _whole(tensor.detach())
            if self.world.first_rank:
                found[name] = tensor.contiguous().cpu()
        return found

    def refuses(self, hardware) -> str | None:
        if hardware.devices == 1 and self.config.shards != 1:
            return "it needs more than one device"
        if hardware.devices % (self.config.shards or 1):
            return f"shards {self.config.shards} does not divide {hardware.devices} devices"
        return None

    def memory(self, facts: Facts, hardware) -> MemoryPlan:
        """With c bytes a gathered weight, p a block's parameters and r those outside the blocks, which stay gathered
        (r c): a block at work has its weights and the buffer that they arrived in, going back that of the block before
        it (2 p c). Its gradients, whole, are then written into the fp32 buffer that they are reduced from (4 p), which
        is there until the next block has come so far. Gradients that wait for the last micro-batch are whole, in the
        dtype that they are summed in.
        """
        size, accumulates = facts.parameters, hardware.accumulation > 1
        n = self.config.shards or hardware.count
        copies, shard = hardware.devices // n, -(-size // n)
        c, summed = 2 if hardware.precision == "bf16" else 4, 8 if self.config.exact else 4
        sizes = [stage.works_with for stage in facts.stages]
        costs, root, last = facts.measured("bf16" if c == 2 else "fp32", False), facts.root_parameters, len(sizes) - 1
        static = {"weights": 4 * shard, "optimizer": facts.optimizer_state_bytes * shard, "buffers": facts.buffer_bytes}
        waits = accumulates and (self.config.accumulate_locally or self.config.exact)

        def block(i: int) -> int:
            return sizes[i] if 0 < i < last else 0

        def gathered(moment) -> int:
            i, others = moment.stage, 0 if self.config.reshard_after_forward else sum(sizes[1:min(moment.stage, last)])
            if moment.backward:
                arriving = block(i - 1) if self.config.reshard_after_forward else 0
            else:
                arriving = root if i == 0 else block(min(i, last - 1))
            return c * (root + block(i) + arriving + others)

        def candidates():
            for moment in moments(facts.stages, costs):
                # what is outside the blocks comes last
                reduced = sum(stage.parameters for stage in facts.stages[moment.stage + 1:last])
                gradients, buckets = (summed * size if waits else 4 * shard) if accumulates else 0, 0
                if moment.backward:
                    if waits:  # in the last pass; what is reduced is let go of
                        gradients = summed * (size - reduced) + 4 * -(-reduced // n)
                    gradients = gradients or 4 * -(-reduced // n)
                    outside = costs[-1].made if moment.stage < last else 0
                    buckets = moment.made + outside + summed * block(moment.stage + 1)
                yield moment.name, {**static, "gradients": gradients, "activations": moment.activations,
                                    "workspace": moment.workspace, "gathered": gathered(moment), "buckets": buckets}
            yield "optimizer step", {**static, "gradients": 4 * shard, "optimizer":
                                     (facts.optimizer_state_bytes + facts.optimizer_step_bytes) * shard}

        # each micro-batch, in a ring: weights gathered for the forward and again for the backward pass, fp32 gradients
        # reduced; once a step, those of a shard over its copies
        gathers = hardware.accumulation * (2 if self.config.reshard_after_forward else 1)
        scatters = 1 if waits else hardware.accumulation
        gathered_bytes = c * (size + sum(sizes) - sum(stage.parameters for stage in facts.stages))  # at each use
        sharing = (gathers * gathered_bytes + scatters * summed * size) * (n - 1) // n
        copying = 2 * summed * shard * (copies - 1) // copies
        # a ring of shards that leaves a machine does so once, as does the ring of each shard's copies
        between = (0 if hardware.count % n == 0 else sharing) + min(n, hardware.count) * copying
        return finish_plan(hardware, candidates(), sharing + copying, between)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _see_losses_in_reports() -> None:
    """Before the backward pass of a unit its weights are gathered: as soon as a gradient comes for one of the tensors
    that it gave, which torch before 2.13 finds in its own containers alone. The losses of a report come first."""
    if Report not in _pytree.SUPPORTED_NODES:
        _pytree.register_pytree_node(Report, lambda report: ([report.losses, report.stats], None),
                                     lambda parts, _: Report(*parts))
