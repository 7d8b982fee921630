"""Deliberate mistakes in the runtime, each of which the parity tests must notice.

Every function makes one mistake and returns what undoes it.
"""

import torch

from galvatron_megatron.runtime import data_parallel, layers
from galvatron_megatron.runtime.data_parallel import PlannedDataParallel
from galvatron_megatron.runtime.groups import GroupRegistry
from galvatron_megatron.runtime.optimizer import PlannedOptimizer
from galvatron_megatron.runtime.resharding import Resharder
from galvatron_megatron.runtime.zero import ZeroPart


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
    return _replace(ZeroPart, "scale_gradients", lambda self, factor: None)


def zero_wrong_group():
    """ZeRO shards over every rank alone instead of over the ranks that hold the same weights."""
    init = ZeroPart.__init__

    def mistaken(self, *arguments):
        init(self, *arguments)
        self.dp_cp_group, _ = torch.distributed.new_subgroups(1)

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
        zero_wrong_group,
        zero_skipped_sum,
        zero_last_micro_batch,
    )
}
