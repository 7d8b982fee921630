"""Deliberate mistakes in the runtime, each of which the parity tests must notice.

Every function makes one mistake and returns what undoes it.
"""

import torch
from megatron.core import parallel_state
from megatron.training import get_args, training

from galvatron_megatron.runtime import data_parallel, layers, zero_optimizer
from galvatron_megatron.runtime.data_parallel import PlannedDataParallel
from galvatron_megatron.runtime.groups import GroupRegistry
from galvatron_megatron.runtime.optimizer import PlannedOptimizer
from galvatron_megatron.runtime.resharding import Resharder
from galvatron_megatron.runtime.zero import ZeroPart, import_engines
from galvatron_megatron.runtime.zero_optimizer import ZeroOptimizer


def _replace(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, original)


def gradient_scale():
    """Gradients scaled by each class's own number of replicas instead of the base's."""
    build = data_parallel._build_part

    def mistaken(*arguments):
        part = build(*arguments)
        for buffer in part.buffers:
            for bucket in buffer.buckets:
                bucket.gradient_scaling_factor = 1.0 / part.dp_cp_group.size()
        return part

    return _replace(data_parallel, "_build_part", mistaken)


def skipped_layernorm_sum():
    """Norms' gradients left as each tp rank computed them."""
    return _replace(PlannedDataParallel, "sum_partial_gradients", lambda self: None)


def stale_resharding():
    """The first tile that was moved arrives again and again."""
    move = Resharder.move
    kept = {}

    def mistaken(self, tile, *, backward=False):
        fresh = move(self, tile, backward=backward)
        return kept.setdefault((id(self), backward, fresh.shape), fresh.clone()).clone()

    return _replace(Resharder, "move", mistaken)


def dropped_gradient():
    """The way back through a resharding returns zeros."""
    move = Resharder.move

    def mistaken(self, tile, *, backward=False):
        fresh = move(self, tile, backward=backward)
        return torch.zeros_like(fresh) if backward else fresh

    return _replace(Resharder, "move", mistaken)


def replicas_counted():
    """Every replica's gradient counts in the norm, not one of each."""
    init = PlannedOptimizer.__init__

    def mistaken(self, optimizers, *, counted, **options):
        init(self, optimizers, counted=[True] * len(counted), **options)

    return _replace(PlannedOptimizer, "__init__", mistaken)


def zero_scale():
    """ZeRO's gradients not normalised by the batch."""
    init = ZeroPart.__init__
    return _replace(ZeroPart, "__init__", lambda self, *arguments: init(self, *arguments[:-1], 1.0))


def zero_scaled_twice():
    """ZeRO's gradients normalised in front of their sums, and once more behind them."""
    finish = ZeroPart.finish_grad_sync

    def mistaken(self, **options):
        finish(self, **options)
        self.scale_gradients(self.scale)

    return _replace(ZeroPart, "finish_grad_sync", mistaken)


def zero_wrong_group():
    """ZeRO shards over every rank alone instead of over the ranks that hold the same weights."""
    init = ZeroPart.__init__

    def mistaken(self, *arguments):
        init(self, *arguments)
        self.dp_cp_group = parallel_state.get_context_parallel_group()  # of one rank

    return _replace(ZeroPart, "__init__", mistaken)


def zero_skipped_sum():
    """ZeRO's gradients of norms left as each tp rank computed them."""
    return _replace(ZeroPart, "sum_over", lambda self, group, found: None)


def zero_last_micro_batch():
    """Gradients forgotten at the start of every backward pass."""
    begin = ZeroPart.begin_backward

    def mistaken(self):
        self.zero_grad_buffer()
        begin(self)

    return _replace(ZeroPart, "begin_backward", mistaken)


def zero_untied():
    """Gradients of embeddings that two stages share left as each of them computed them."""
    add = ZeroPart._sum

    def mistaken(self, group, parameters):
        if group is not self.groups.embd:
            add(self, group, parameters)

    return _replace(ZeroPart, "_sum", mistaken)


def zero_stale():
    """What ZeRO 3 keeps whole stays as it was in front of the step."""
    import_engines()
    from galvatron_megatron.runtime.zero_engines import ShardedParametersEngine

    apply = ShardedParametersEngine.apply

    def mistaken(self):
        before = {parameter: parameter.data.clone() for parameter in self.whole}
        apply(self)
        for parameter, data in before.items():
            if parameter.data.shape == data.shape:
                parameter.data.copy_(data)

    return _replace(ShardedParametersEngine, "apply", mistaken)


def zero_duplicates_counted():
    """In the norm every tp rank's copy of a gradient that all of them have counts."""
    shard = ZeroOptimizer._shard

    def mistaken(self, piece):
        found = shard(self, piece)
        found.tensor_model_parallel = True
        return found

    return _replace(ZeroOptimizer, "_shard", mistaken)


def zero_lowered():
    """ZeRO 2 is run as ZeRO 1."""
    engines = import_engines()
    init = engines.ShardedStatesEngine.__init__

    def mistaken(self, optimizer, names, stage, options):
        init(self, optimizer, names, 1, options)

    return _replace(engines.ShardedStatesEngine, "__init__", mistaken)


def last_stage_overflows():
    """No mistake: in the fifth step a gradient of the last pipeline stage is infinite.

    Under ZeRO it is one in the shard of one rank; without a plan one of every replica, as replicas are equal.
    """
    finalize = training.finalize_model_grads

    def poisoned(model, *arguments, **options):
        finalize(model, *arguments, **options)
        if get_args().curr_iteration != 4 or not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        parts = [part for chunk in model for part in getattr(chunk, "parts", {}).values()]
        engines = [engine for part in parts if isinstance(part, ZeroPart) for engine in part.engines]
        if not parts:
            next(model[-1].parameters()).main_grad.view(-1)[0] = torch.inf
        elif engines and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            engines[0].gradient(0)[0] = torch.inf

    return _replace(training, "finalize_model_grads", poisoned)


def zero_nothing_whole():
    """Small vectors are gathered in every pass."""
    return _replace(zero_optimizer, "_whole_vectors", lambda *_: [])


def zero_sums_apart():
    """Partial gradients are summed one by one."""
    add = ZeroPart._sum

    def mistaken(self, group, parameters):
        for parameter in [id(p) for p in self.parameters if id(p) in parameters]:
            add(self, group, {parameter})

    return _replace(ZeroPart, "_sum", mistaken)


def late_gathers():
    """Parameters gathered when a layer needs them."""
    return _replace(data_parallel, "_gather_ahead", lambda module, parts: None)


def unknown_groups():
    """Megatron's own groups are not used."""
    return _replace(GroupRegistry, "adopt", lambda self, sets, group: None)


def unscaled_balance():
    """Losses of routers summed over a layer's own data-parallel ranks, averaged over the base's."""
    return _replace(layers, "experts_config", lambda config, context: config)


MUTATIONS = {
    function.__name__: function
    for function in (
        gradient_scale,
        skipped_layernorm_sum,
        stale_resharding,
        dropped_gradient,
        replicas_counted,
        unknown_groups,
        unscaled_balance,
        late_gathers,
        zero_scale,
        zero_scaled_twice,
        zero_wrong_group,
        zero_skipped_sum,
        zero_last_micro_batch,
        zero_untied,
        zero_stale,
        zero_duplicates_counted,
        zero_lowered,
        zero_nothing_whole,
        zero_sums_apart,
        last_stage_overflows,
    )
}
