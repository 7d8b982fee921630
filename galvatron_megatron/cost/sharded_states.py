"""Seconds and bytes that sharding a layer's states takes, whoever says how long a collective takes."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

from galvatron_megatron.cost.memory import ElementBytes, Share
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.overlap import exposed_seconds
from galvatron_megatron.cost.sharding import BACKWARD, FORWARD, REDUCTION, UPDATE, sharding_collectives
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.plan.zero_rules import bucket_elements, is_deepspeed, reduction_buffers, usual_bucket

GATHER, REDUCE = "gather", "reduce"
"""What a collective is for."""

Sent = Mapping[tuple[str, str], float]
"""Seconds by when collectives are sent and what they are for: (``FORWARD``, ``GATHER``) -> seconds."""


@dataclass(kw_only=True, frozen=True, slots=True)
class AtUse:
    """Which part of what stage 3 gathers in a pass computation waits for; the rest is gathered ahead of it.

    The runtime gathers a part of the model while the part in front of it computes, see ``runtime/zero_ahead``:
    nothing computes in front of the first part of a model chunk.
    """

    forward: float
    """Share of the gathered bytes, from 0 to 1."""
    backward: float


EMBEDDING_AT_USE = AtUse(forward=1.0, backward=0.0)
"""The embedding comes first, and last in backward passes: it is gathered while the layer behind it computes."""
HEAD_AT_USE = AtUse(forward=0.0, backward=1.0)


def layer_at_use(layers: int, pp: int) -> AtUse:
    """What the layers of a stage gather at use, on average over them, since no layer knows its place.

    The first of a stage's n layers has nothing in front of it that computes for long: 1 / n. In backward
    passes neither has the last one, except on the last of P stages, where the head computes: (P - 1) / P n.

    Args:
        layers: of the model.
        pp: stages.
    """
    first = 1 / max(1, layers // pp)
    return AtUse(forward=first, backward=first * (pp - 1) / pp)


class CollectiveTime(Protocol):
    """Prices collectives: by a cluster's links, or by measured curves."""

    def __call__(self, kind: str, message_bytes: float, ranks: int, stride: int) -> float:
        """Seconds of one collective over ranks that are ``stride`` apart."""
        ...


@dataclass(kw_only=True, frozen=True, slots=True)
class SentCollective:
    """A collective that keeps some parameters' states equal, or sharded, among the ranks that share them."""

    kind: str
    """As a ``CollectiveTime`` knows it."""
    when: str
    role: str
    """``GATHER`` or ``REDUCE``."""
    count: float
    """How often, each time."""
    bytes: float
    """Of one of them, counted in full (gathered output, input of a reduction)."""
    ranks: int
    stride: int
    """Distance between neighbours of these ranks."""

    def seconds(self, price: CollectiveTime) -> float:
        """Of all of them, each time."""
        return self.count * price(self.kind, self.bytes, self.ranks, self.stride)

    @property
    def is_sent(self) -> bool:
        """False for a message among one rank, or of nothing."""
        return self.ranks > 1 and self.bytes > 0


def sent_collectives(
    shares: Iterable[Share],
    strategy: Strategy,
    element: ElementBytes,
    options: RunOptions,
    *,
    modules: int = 1,
    borrowed: int = 0,
    whole: int = 0,
    together: int = 1,
    settings: int = 1,
) -> tuple[SentCollective, ...]:
    """The collectives that shard some parameters' states; see ``sharding_collectives``.

    Gradients of all parts of a stage that are kept alike are reduced in one message, or bucket by bucket, and
    so are parameters gathered behind the optimizer: each part has its share of these messages. With several
    instances of Megatron's distributed optimizer, each scatters gradients among its own ranks, then shards are
    summed over the instances.

    Args:
        shares: parameters of the rank by who replicates them.
        strategy: how the layer runs.
        element: bytes of one parameter by purpose.
        options: switches of the job.
        modules: that compute with parameters, the one that borrows counted.
        borrowed: parameters that one module takes from another part of the model: stage 3 gathers them again.
        whole: parameters, of the first share, that stage 3 keeps whole; ``modules`` does not count theirs.
        together: how many parts like this one a rank has.
        settings: groups of parameters with optimizer settings of their own, as with and without weight decay,
            which DeepSpeed's stages 1 and 2 gather one by one.
    """
    own = max(1, modules - bool(borrowed))
    by_deepspeed = is_deepspeed(strategy.zero, strategy.offload, options.deepspeed_zero_1)
    sent = []
    for number, share in enumerate(shares):
        collectives = sharding_collectives(
            share.parameters,
            strategy.zero,
            element,
            modules=own,
            deepspeed=by_deepspeed,
            whole=0 if number else whole,
        )
        if strategy.zero == 3 and borrowed and not number:
            again = sharding_collectives(borrowed, 3, element)
            collectives += tuple(entry for entry in again if entry.kind == "all_gather")
        for entry in collectives:
            role = GATHER if entry.kind == "all_gather" else REDUCE
            count: float = entry.count
            if role == REDUCE or entry.when == UPDATE:
                buckets = _buckets(share, options, together, by_deepspeed=by_deepspeed)
                if role == GATHER and strategy.zero == 3:
                    buckets = 1
                elif role == GATHER and by_deepspeed:
                    buckets += settings - 1
                count = buckets / together
            found = SentCollective(
                kind=entry.kind,
                when=entry.when,
                role=role,
                count=count,
                bytes=entry.bytes / count,
                ranks=share.sharding,
                stride=share.stride,
            )
            sent.append(found)
            if entry.kind == "reduce_scatter":
                between = replace(
                    found,
                    kind="all_reduce",
                    bytes=found.bytes / share.sharding,
                    ranks=share.replicas // share.sharding,
                    stride=share.stride * share.sharding,
                )
                sent.append(between)
    return tuple(entry for entry in sent if entry.is_sent)


def _buckets(share: Share, options: RunOptions, together: int, *, by_deepspeed: bool) -> int:
    """In how many messages the gradients of some parts are reduced."""
    elements = share.parameters * together
    if options.bucket_count:
        return options.bucket_count if together > 1 else 1
    if by_deepspeed:
        bucket = bucket_elements(elements, 0, share.sharding, options.bucket_elements)
    elif options.overlap_gradients:
        bucket = options.bucket_elements or usual_bucket(share.replicas)
    else:
        return 1
    return max(1, ceil(elements / max(1, bucket)))


def partial_sum(
    parameters: int,
    share: Share,
    strategy: Strategy,
    element: ElementBytes,
    options: RunOptions,
    together: int = 1,
) -> tuple[SentCollective, ...]:
    """The sum, over a tp group, of gradients that each of its ranks computes in part: once per step.

    Args:
        parameters: of the rank that have such gradients.
        share: they are of.
        strategy: how the layer runs.
        element: bytes of one parameter by purpose.
        options: switches of the job.
        together: how many parts like this one a rank has, which are summed in one message.
    """
    return _summed(parameters, strategy.tp, 1, share, strategy, element, options, 1 / together)


def tied_sum(
    parameters: int, stride: int, share: Share, strategy: Strategy, element: ElementBytes, options: RunOptions
) -> tuple[SentCollective, ...]:
    """The sum of the gradients of an embedding that the first and the last stage have: once per step.

    Args:
        parameters: of the embedding on a rank.
        stride: distance between ranks of the two stages.
        share: they are of.
        strategy: of embedding and head.
        element: bytes of one parameter by purpose.
        options: switches of the job.
    """
    return _summed(parameters, 2, stride, share, strategy, element, options)


def _summed(
    parameters: int,
    ranks: int,
    stride: int,
    share: Share,
    strategy: Strategy,
    element: ElementBytes,
    options: RunOptions,
    count: float = 1.0,
) -> tuple[SentCollective, ...]:
    """Megatron sums whole gradients, whatever it shards; the engines of ZeRO the parts that each rank keeps."""
    size = parameters * element.gradient
    if is_deepspeed(strategy.zero, strategy.offload, options.deepspeed_zero_1):
        size = parameters / share.sharding * element.under_deepspeed.gradient
    found = SentCollective(
        kind="all_reduce",
        when=REDUCTION,
        role=REDUCE,
        count=count,
        bytes=size / count,
        ranks=ranks,
        stride=stride,
    )
    return (found,) if found.is_sent else ()


def sent_seconds(sent: Iterable[SentCollective], price: CollectiveTime) -> dict[tuple[str, str], float]:
    """Seconds of collectives by when they are sent and what they are for.

    Args:
        sent: the collectives.
        price: of one collective.
    """
    found: dict[tuple[str, str], float] = {}
    for entry in sent:
        key = (entry.when, entry.role)
        found[key] = found.get(key, 0.0) + entry.seconds(price)
    return found


def micro_batch_seconds(
    phase: str, computing_seconds: float, sent: Sent, options: RunOptions, slowdown: float, at_use: AtUse
) -> float:
    """What ZeRO 2 and 3 add to a phase of every micro-batch.

    Gathers G start while the part in front computes; in a row of equal layers that is as long as this one's
    own computation C. A share u is gathered at use. Reductions R run beside computation where the job overlaps
    them, on the same links as gathers; else behind it::

        u G + (1 - u) E(G + R) + u E(R)        overlapped, E(T) = exposed_seconds(T, C, slowdown)
        u G + (1 - u) E(G) + R                 not

    Args:
        phase: ``FORWARD`` or ``BACKWARD``.
        computing_seconds: of the part in front, without collectives of ZeRO.
        sent: seconds of collectives.
        options: switches of the job.
        slowdown: of computation and communication while both run.
        at_use: what is not gathered ahead.
    """
    gather, reduce = sent.get((phase, GATHER), 0.0), sent.get((phase, REDUCE), 0.0)
    beside, behind = (reduce, 0.0) if options.overlap_gradients else (0.0, reduce)
    share = at_use.forward if phase == FORWARD else at_use.backward

    def exposed(communication: float) -> float:
        return exposed_seconds(communication, computing_seconds, slowdown)

    return behind + share * (gather + exposed(beside)) + (1 - share) * exposed(gather + beside)


def _wanted(options: RunOptions, elements: int) -> int | None:
    """Elements that the job asks to reduce at once, of so many; None where it says nothing."""
    return ceil(elements / options.bucket_count) if options.bucket_count else options.bucket_elements


def is_sent_every_micro_batch(when: str) -> bool:
    """True for what is sent in forward or backward passes."""
    return when in (FORWARD, BACKWARD)


def transient_bytes(
    shares: Collection[Share],
    strategy: Strategy,
    element: ElementBytes,
    options: RunOptions,
    layers: int,
    *,
    borrowed: int = 0,
    whole: int = 0,
) -> int:
    """Bytes that ZeRO 2 and 3 need beside a layer's states while it runs.

    Stage 3 has the layer's weights whole, and those of the module it goes on with. Stages 2 and 3 reduce in a
    bucket (or two, see ``reduction_buffers``), in the width of the weights, of which they make a copy in the
    width that is reduced in.

    Args:
        shares: parameters of the rank by who replicates them.
        strategy: how the layer runs.
        element: bytes of one parameter by purpose.
        options: switches of the job.
        layers: that may share the bucket.
        borrowed: parameters of another module that are gathered as well.
        whole: those of the parameters that are whole all the time.
    """
    found = 0
    if strategy.zero == 3:
        found += (2 * (sum(share.parameters for share in shares) - whole) + borrowed) * element.weight
    if strategy.zero >= 2:
        # Of how many elements the largest parameter is, is not known here: at most all of a layer's.
        bucket = sum(
            bucket_elements(
                share.parameters * layers,
                share.parameters,
                share.sharding,
                _wanted(options, share.parameters * layers),
            )
            for share in shares
        )
        buffers = reduction_buffers(strategy.zero, options.overlap_gradients)
        width = buffers * element.weight + (element.gradient if element.gradient != element.weight else 0)
        found += bucket * width
    return found
