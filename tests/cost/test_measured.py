"""Prices from a profile: every uniform plan has one, it is the sum of its terms, and nothing is guessed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from profiles import (
    EMBEDDING_PARAMETERS,
    FOUR_RANKS,
    LATENCY,
    LAYER_PARAMETERS,
    PER_BYTE,
    REPLICATED,
    curve,
    small_model,
    small_profile,
    ulysses_point,
)

from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.measured import UNAVAILABLE_BYTES, MeasuredCostModel
from galvatron_megatron.cost.measured_points import CurveTable, PartTable, fit_steps
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.overlap import exposed_seconds
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.describe.cluster import Host
from galvatron_megatron.describe.profile import EMBEDDING, HEAD, EnginePoint, PartPoint, StepPoint
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy

MODEL = small_model()
PROFILE = small_profile(MODEL)
DIGEST = layer_digest(MODEL.layers[0])


def costs(**changes: object) -> MeasuredCostModel:
    return MeasuredCostModel(MODEL, FOUR_RANKS, replace(PROFILE, **changes), RunOptions(implementation="local"))


HOST = Host(gb_per_second=4.0, memory_gb_per_second=8.0, efficiency=1.0, memory_gib=16.0, source="measured")
HOST_SECONDS = 1e-8
"""Per parameter that the host updates."""


def host_costs(model=MODEL, profile=PROFILE, **changes: object) -> MeasuredCostModel:
    steps = tuple(
        StepPoint(tensors=1, parameters=n, updated=n, zero=1, seconds=1e-4 + n * HOST_SECONDS)
        for n in (250_000, 1_000_000)
    )
    cluster = replace(FOUR_RANKS, host=HOST)
    profile = replace(profile, **({"host_steps": steps} | changes))
    return MeasuredCostModel(model, cluster, profile, RunOptions(implementation="local"))


def uniform(
    *,
    pp: int = 1,
    tp: int = 1,
    zero: int = 0,
    size: int = 1,
    batch: int = 8,
    recompute: Recompute = Recompute.NONE,
    kind: SequenceParallel = SequenceParallel.NONE,
) -> Plan:
    dp = 4 // pp // tp
    base = Strategy(tp=tp, dp=dp, zero=zero, sequence_parallel=kind)
    layer = LayerPlan(kind=MODEL.layers[0].kind, strategy=replace(base, recompute=recompute))
    return Plan(
        pp=pp,
        micro_batch_size=size,
        micro_batches=batch // dp // size,
        base=base,
        stages=(StagePlan(layers=(layer,) * (len(MODEL.layers) // pp)),) * pp,
    )


def all_uniform():
    for pp, tp in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)):
        dp = 4 // pp // tp
        for size in (1, 2):
            for zero in (0, 1) if dp > 1 else (0,):
                for recompute in Recompute:
                    for kind in (SequenceParallel.NONE, SequenceParallel.MEGATRON)[: 1 + (tp > 1)]:
                        yield uniform(pp=pp, tp=tp, zero=zero, size=size, recompute=recompute, kind=kind)


@pytest.mark.parametrize(
    "plan", list(all_uniform()), ids=lambda p: f"pp{p.pp} {p.layers[0].strategy} b{p.micro_batch_size}"
)
def test_every_uniform_plan_is_priced_from_measurements(plan):
    model = costs()
    found = estimate_plan(plan, model)
    assert not model.refusals
    assert 0 < found.step_seconds < 1
    assert found.peak_bytes < 100e6
    for stage in found.stages:
        assert {term.source for term in stage.micro_batch_terms if "pipeline" not in term.name} == {"measured"}
        assert sum(t.value for t in stage.micro_batch_terms) == pytest.approx(stage.seconds)
        assert sum(t.value for t in stage.sync_terms) == pytest.approx(stage.sync_seconds)


def test_the_step_of_a_data_parallel_plan_is_what_one_computes_by_hand():
    found = estimate_plan(uniform(size=2), costs())
    # One micro-batch of 2 samples: 4 layers of (2 + 4) ms, embedding and head 0.6 ms each.
    assert found.pipeline_seconds == pytest.approx(4 * 6e-3 + 2 * 0.6e-3)
    parameters = 4 * LAYER_PARAMETERS + EMBEDDING_PARAMETERS + 256
    reduce = LATENCY + 4 * parameters * PER_BYTE
    optimizer = 1e-5 * (4 * 12 + 4) + 2e-9 * parameters
    assert found.sync_seconds == pytest.approx(reduce + optimizer, rel=1e-3)
    assert found.stages[0].state_bytes == 16 * parameters
    assert found.stages[0].activation_bytes == 4 * 1_600_000 + 2 * 60_000


def test_zero_1_trades_an_all_reduce_for_two_halves_and_shards_the_optimizer():
    plain, sharded = (estimate_plan(uniform(zero=zero), costs()) for zero in (0, 1))
    names = {term.name: term.value for term in sharded.stages[0].sync_terms}
    assert set(names) == {"gradient reduction", "parameter gathering", "optimizer"}
    assert names["optimizer"] < {t.name: t.value for t in plain.stages[0].sync_terms}["optimizer"]
    parameters = 4 * LAYER_PARAMETERS + EMBEDDING_PARAMETERS + 256
    assert sharded.stages[0].state_bytes == pytest.approx(8 * parameters + 8 * parameters / 4, rel=1e-5)


def test_sequence_parallelism_adds_the_gradients_that_every_rank_holds():
    found = estimate_plan(uniform(tp=2, kind=SequenceParallel.MEGATRON), costs())
    terms = {term.name: term.value for term in found.stages[0].sync_terms}
    assert terms["replicated gradients over tp"] == pytest.approx(LATENCY + 4 * 4 * REPLICATED * PER_BYTE)


def test_a_pipeline_sends_and_keeps_its_tied_embeddings_equal():
    model = costs()
    plan = uniform(pp=2)
    found = estimate_plan(plan, model)
    message = MODEL.seq_length * MODEL.hidden_size * 4
    assert found.stages[0].chunks[0].send_seconds == pytest.approx(2 * (LATENCY + message * PER_BYTE))
    assert found.stages[1].chunks[0].send_seconds == 0
    last = {term.name: term.value for term in found.stages[1].sync_terms}
    copied = MODEL.padded_vocab_size(1) * MODEL.hidden_size
    assert last["tied embedding gradient"] == pytest.approx(LATENCY + 4 * copied * PER_BYTE)
    untied = small_model(tied=False)
    other = MeasuredCostModel(untied, FOUR_RANKS, small_profile(untied), RunOptions(implementation="local"))
    names = {term.name for term in estimate_plan(plan, other).stages[1].sync_terms}
    assert "tied embedding gradient" not in names


def test_what_was_not_measured_never_fits_and_is_named():
    model = costs()
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=Strategy(dp=4))
    for strategy in (
        Strategy(cp=2, dp=2),
        Strategy(dp=4, expert_parallel=2),
        Strategy(dp=4, zero=3, offload=Offload.OPTIMIZER),
        Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.ULYSSES),
        Strategy(tp=4),
    ):
        assert model.layer_cost(0, strategy, setting).transient_bytes == UNAVAILABLE_BYTES
    assert len(model.refusals) == 5
    assert set(model.refusals.values()) == {"not measured"}


def with_ulysses(*points: PartPoint, profile=PROFILE) -> PartTable:
    return PartTable(replace(profile, parts=(*profile.parts, *points)))


@pytest.mark.parametrize(
    ("size", "source"), [(1, "measured"), (2, "measured"), (3, "modelled"), (8, "modelled"), (12, "modelled")]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ulysses_adds_its_exchanges_to_what_one_rank_computes_for_its_share(ranks, size, source):
    table = with_ulysses(*(ulysses_point(MODEL, ranks, n) for n in (1, 2)))
    how = (DIGEST, ranks, SequenceParallel.ULYSSES)
    exchange, forward = 1e-4 + 2e-5 * size, 1e-3 * size / ranks
    plain = table.lookup(*how, Recompute.NONE, size)
    assert plain.forward_seconds == pytest.approx(forward + exchange)
    assert plain.backward_seconds == pytest.approx(2 * forward + exchange)
    assert plain.activation_bytes == 800_000 * size // ranks
    assert plain.transient_bytes == 50_000 * size // ranks + 100 * size
    assert (plain.parameters, plain.tensors, plain.source) == (LAYER_PARAMETERS, 12, source)
    # Never measured with recomputation: attention is computed again with its exchanges.
    for recompute, share, kept in ((Recompute.FULL, 1.0, 1), (Recompute.SELECTIVE, 0.25, 5)):
        found = table.lookup(*how, recompute, size)
        assert found.forward_seconds == pytest.approx(forward + exchange)
        assert found.backward_seconds == pytest.approx((2 + share) * forward + 2 * exchange)
        assert found.activation_bytes == pytest.approx(kept * 100_000 * size / ranks, abs=1)
        assert found.source == "modelled"


def test_ulysses_is_told_by_one_point_and_follows_a_bend_of_one_rank():
    parts = bent(2, "forward_seconds", recomputed_at=lambda size: True)
    table = with_ulysses(*(ulysses_point(MODEL, 2, n) for n in (1, 2)), profile=replace(PROFILE, parts=parts))
    found = table.lookup(DIGEST, 2, SequenceParallel.ULYSSES, Recompute.NONE, 4)
    # The bend of 1 ms at two samples of one rank lies at four of two; below one sample the line goes on.
    added = [1e-3 * n / 2 + 1e-4 + 2e-5 * n - line for n, line in ((1, 0.0), (2, 1e-3))]
    assert found.forward_seconds == pytest.approx(3e-3 + added[1] + 2 * (added[1] - added[0]))
    single = with_ulysses(ulysses_point(MODEL, 2, 2)).lookup(
        DIGEST, 2, SequenceParallel.ULYSSES, Recompute.NONE, 4
    )
    assert single.forward_seconds == pytest.approx(2e-3 + 2 * 1.4e-4)


def test_ulysses_without_one_rank_is_read_as_it_was_measured_and_failures_count():
    how = (DIGEST, 2, SequenceParallel.ULYSSES)
    points = [ulysses_point(MODEL, 2, n) for n in (1, 2)]
    profile = small_profile(MODEL, tps=(2,))
    again = replace(points[0], recompute=Recompute.FULL, backward_seconds=5e-3)
    table = with_ulysses(*points, again, profile=profile)
    assert table.lookup(*how, Recompute.NONE, 2).forward_seconds == points[1].forward_seconds
    assert table.lookup(*how, Recompute.FULL, 1).backward_seconds == pytest.approx(5e-3)
    assert table.lookup(*how, Recompute.SELECTIVE, 1) == "not measured"
    assert with_ulysses().lookup(*how, Recompute.NONE, 1) == "not measured"
    # A job that ran it so was observed.
    observed = with_ulysses(*points, again)
    assert observed.lookup(*how, Recompute.FULL, 1).backward_seconds == pytest.approx(5e-3)
    failed = replace(points[1], failure="out of memory")
    table = with_ulysses(points[0], failed)
    assert table.lookup(*how, Recompute.NONE, 1).source == "measured"
    assert table.lookup(*how, Recompute.NONE, 2) == "out of memory"
    # Recomputed layers need less.
    assert table.lookup(*how, Recompute.FULL, 2).source == "modelled"
    assert with_ulysses(replace(points[0], failure="refused")).lookup(*how, Recompute.FULL, 1) == "refused"
    # Where one rank has no room for its share, neither have these.
    short = tuple(
        replace(point, failure="out of memory")
        if (point.part, point.tp, point.recompute, point.micro_batch_size) == (DIGEST, 1, Recompute.NONE, 4)
        else point
        for point in PROFILE.parts
    )
    table = with_ulysses(*points, profile=replace(PROFILE, parts=short))
    assert table.lookup(*how, Recompute.NONE, 8) == "out of memory"
    assert table.lookup(*how, Recompute.FULL, 8).activation_bytes == 400_000


def test_a_layer_under_ulysses_reduces_whole_gradients_over_all_ranks():
    points = tuple(ulysses_point(MODEL, 2, n) for n in (1, 2))
    model = costs(parts=(*PROFILE.parts, *points))
    assert model.prices_ulysses and not costs().prices_ulysses
    strategy = Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.ULYSSES)
    base = replace(strategy, sequence_parallel=SequenceParallel.MEGATRON)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=2, micro_batches=2, base=base)
    price = model.priced_layer(0, strategy, setting)
    assert not model.refusals
    assert price.forward_seconds == pytest.approx(1e-3 + 1.4e-4)
    assert price.cost.state_bytes == 16 * LAYER_PARAMETERS
    sync = {term.name: term.value for term in price.sync_terms}
    assert set(sync) == {"gradient reduction", "optimizer"}
    assert sync["gradient reduction"] == pytest.approx(LATENCY / 4 + 4 * LAYER_PARAMETERS * PER_BYTE)
    # Its layout is that of Megatron's sequence parallelism: nothing moves in between.
    assert model.reshard_seconds(0, base, strategy, setting) == 0.0


def test_a_failed_measurement_counts_for_larger_micro_batches_too():
    failed = tuple(
        replace(point, failure="out of memory")
        if (point.part, point.tp, point.micro_batch_size) == (DIGEST, 1, 2)
        else point
        for point in PROFILE.parts
    )
    table = PartTable(replace(PROFILE, parts=failed))
    look = (DIGEST, 1, SequenceParallel.NONE, Recompute.NONE)
    assert table.lookup(*look, 1).forward_seconds == pytest.approx(1e-3)
    assert table.lookup(*look, 2) == "out of memory"
    assert table.lookup(*look, 3) == "out of memory"
    assert table.lookup(EMBEDDING, *look[1:], 4).source == "measured"


@pytest.mark.parametrize(
    ("size", "source"), [(1, "measured"), (2, "measured"), (3, "measured"), (7, "modelled")]
)
def test_sizes_between_are_interpolated_and_larger_ones_are_tagged(size, source):
    found = PartTable(PROFILE).lookup(DIGEST, 1, SequenceParallel.NONE, Recompute.FULL, size)
    assert found.forward_seconds == pytest.approx(1e-3 * size)
    assert found.backward_seconds == pytest.approx(3e-3 * size)
    assert found.activation_bytes == 100_000 * size
    assert found.source == source


def bent(size: int, phase: str, *, recomputed_at: Callable[[int], bool]) -> tuple[PartPoint, ...]:
    """Points with 1 ms more at one size without recomputation, and recomputed ones at some sizes only."""
    return tuple(
        replace(point, **{phase: getattr(point, phase) + 1e-3})
        if (point.part, point.tp, point.recompute, point.micro_batch_size) == (DIGEST, 1, Recompute.NONE, size)
        else point
        for point in PROFILE.parts
        if point.recompute is Recompute.NONE or recomputed_at(point.micro_batch_size)
    )


def test_recomputation_between_its_sizes_follows_the_measured_time_without_it():
    # Per layer 1 ms more than the line at two samples, seen without recomputation only.
    parts = bent(2, "backward_seconds", recomputed_at=lambda size: size != 2)
    sizes = {p.micro_batch_size for p in parts if p.recompute is Recompute.FULL}
    assert 2 not in sizes and min(sizes) < 2 < max(sizes)
    table = PartTable(replace(PROFILE, parts=parts))
    found = table.lookup(DIGEST, 1, SequenceParallel.NONE, Recompute.FULL, 2)
    assert found.forward_seconds == pytest.approx(2e-3)
    assert found.backward_seconds == pytest.approx(6e-3 + 1e-3)
    assert found.activation_bytes == 200_000
    # The time without recomputation may itself lie between two sizes.
    assert table.lookup(DIGEST, 1, SequenceParallel.NONE, Recompute.FULL, 3).backward_seconds == pytest.approx(
        9e-3 + 0.5e-3
    )


def test_recomputation_goes_on_above_its_sizes_with_the_measured_time_without_it():
    # Without recomputation a bend is measured at four samples; with it nothing is, above two.
    parts = bent(4, "forward_seconds", recomputed_at=lambda size: size < 4)
    found = PartTable(replace(PROFILE, parts=parts)).lookup(DIGEST, 1, SequenceParallel.NONE, Recompute.FULL, 4)
    assert found.forward_seconds == pytest.approx(4e-3 + 1e-3)
    assert found.backward_seconds == pytest.approx(12e-3)
    assert found.activation_bytes == 400_000
    assert found.source == "modelled"


def test_a_missing_curve_is_an_error_and_a_near_one_is_used():
    table = CurveTable(PROFILE)
    assert table.curve("all_reduce", 2, 3).stride in (1, 2)
    with pytest.raises(DescriptionError, match="all_reduce over 3 ranks"):
        table.curve("all_reduce", 3, 1)
    assert table.seconds("all_reduce", 1e6, 1, 1) == 0


def test_a_change_of_layout_takes_as_long_as_its_all_to_all():
    plain, split = Strategy(tp=1, dp=4), Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON)
    setting = Setting.of(uniform(size=2))
    measured, modelled = costs(collectives=(*PROFILE.collectives, curve("all_to_all", 2, 1))), costs()
    assert (measured.reshard_source(plain, split), modelled.reshard_source(plain, split)) == (
        "measured",
        "modelled",
    )
    # A rank keeps half of its share and gets the other half; an all-to-all of two moves half of its message.
    whole = setting.micro_batch_samples * MODEL.seq_length * MODEL.hidden_size * 4
    message = whole / 4 / 2
    assert measured.reshard_seconds(0, plain, split, setting) == pytest.approx(
        2 * (LATENCY + message * 2 * PER_BYTE)
    )
    assert measured.reshard_seconds(0, plain, plain, setting) == 0.0
    assert modelled.reshard_seconds(0, plain, split, setting) > 0
    # Out of a replicated layout a rank needs nothing from the other; into it, the half that the other has.
    replicated = Strategy(tp=2, dp=2)
    assert measured.reshard_seconds(0, split, replicated, setting) == pytest.approx(
        LATENCY + 2 * message * 2 * PER_BYTE
    )
    mixed = uniform(size=2)
    layers = list(mixed.stages[0].layers)
    layers[1] = replace(layers[1], strategy=split)
    mixed = replace(mixed, stages=(StagePlan(layers=tuple(layers)),))
    for model, source in ((measured, "measured"), (modelled, "modelled")):
        found = [
            term
            for term in estimate_plan(mixed, model).stages[0].micro_batch_terms
            if term.name == "resharding"
        ]
        assert [term.source for term in found] == [source] and found[0].value > 0


def sent(message_bytes: float) -> float:
    return LATENCY + message_bytes * PER_BYTE


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_zero_2_reduces_after_every_micro_batch_and_gathers_behind_the_step(micro_batches):
    strategy = Strategy(dp=4, zero=2)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=micro_batches, base=strategy)
    price = costs().priced_layer(0, strategy, setting)
    # Four layers fill one bucket.
    together = sent(4 * LAYER_PARAMETERS * 4) / 4
    assert price.forward_seconds == pytest.approx(1e-3)
    assert price.backward_seconds == pytest.approx(2e-3 + together)
    optimizer = 12 * 1e-5 + LAYER_PARAMETERS / 4 * 2e-9
    assert price.cost.sync_seconds == pytest.approx(optimizer + together)
    assert {term.name: term.source for term in price.sync_terms} == {
        "optimizer": "modelled",
        "parameter gathering": "measured",
    }
    assert price.cost.state_bytes == LAYER_PARAMETERS * (4 + (4 + 8) / 4)
    assert price.cost.transient_bytes == 50_000 + 4 * LAYER_PARAMETERS * 4
    assert sum(term.value for term in price.micro_batch_terms) == pytest.approx(price.cost.micro_batch_seconds)


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
def test_zero_3_gathers_every_module_but_norms_in_every_pass(recompute):
    strategy = Strategy(dp=4, zero=3, recompute=recompute)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=Strategy(dp=4))
    price = costs().priced_layer(0, strategy, setting)
    # Four linears; two norms stay whole and are gathered behind the step, with those of all layers.
    norms = 4 * MODEL.hidden_size
    gathered = 4 * LATENCY + (LAYER_PARAMETERS - norms) * 4 * PER_BYTE
    reduced = sent(4 * LAYER_PARAMETERS * 4) / 4
    plain = costs().priced_layer(0, replace(strategy, zero=0), setting)
    slowdown = FOUR_RANKS.constants.overlap_slowdown
    # The first of four layers waits for all of it. Others are gathered while a layer computes, those that are
    # computed again no more often.
    hidden = exposed_seconds(gathered, plain.forward_seconds, slowdown)
    assert price.forward_seconds == pytest.approx(plain.forward_seconds + gathered / 4 + hidden * 3 / 4)
    hidden = exposed_seconds(gathered, plain.backward_seconds, slowdown)
    assert price.backward_seconds == pytest.approx(plain.backward_seconds + hidden + reduced)
    sync = {term.name: term.value for term in price.sync_terms}
    assert sync.keys() == {"optimizer", "parameter gathering"}
    assert sync["parameter gathering"] == pytest.approx(sent(4 * norms * 4) / 4)
    assert price.cost.state_bytes == LAYER_PARAMETERS * 16 / 4 + norms * 4
    bucket = 4 * LAYER_PARAMETERS * 4
    assert price.cost.transient_bytes == 50_000 + 2 * (LAYER_PARAMETERS - norms) * 4 + bucket
    short = RunOptions(implementation="local", bucket_elements=LAYER_PARAMETERS)
    small = MeasuredCostModel(MODEL, FOUR_RANKS, PROFILE, short).layer_cost(0, strategy, setting)
    assert price.cost.transient_bytes - small.transient_bytes == bucket * 3 / 4


def test_zero_3_gathers_a_tied_embedding_for_the_head_again():
    strategy = Strategy(dp=4, zero=3)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=strategy)
    head, embedding = costs().priced_head(setting), costs().priced_embedding(setting)
    shared = MODEL.padded_vocab_size(1) * MODEL.hidden_size * 4
    # Beside the final norm, whose 256 parameters are no less than the smallest message measured.
    gathered = sent(shared) + sent(256 * 4)
    assert head.backward_seconds - 2e-4 > gathered
    # In the forward pass it is gathered beside the last layer's computation of 1 ms.
    slowdown = FOUR_RANKS.constants.overlap_slowdown
    assert head.forward_seconds == pytest.approx(1e-4 + (slowdown - 1) * gathered)
    # Words and positions are modules of their own.
    gathered = 2 * sent(EMBEDDING_PARAMETERS * 4 / 2)
    assert embedding.forward_seconds == pytest.approx(1e-4 + gathered)
    # Reduced with the layers: no start of its own.
    more = EMBEDDING_PARAMETERS * 4 * PER_BYTE
    hidden = (slowdown - 1) * gathered
    assert embedding.backward_seconds - 2e-4 == pytest.approx(hidden + more)


@pytest.mark.parametrize(
    ("zero", "offload", "copied", "host"),
    [
        # fp32: gradient shard to the host, new weights back, unless they stay there.
        (1, Offload.OPTIMIZER, 8, 20 / 4),
        (2, Offload.OPTIMIZER, 8, 20 / 4),
        (3, Offload.OPTIMIZER, 8, 16 / 4),
        (3, Offload.PARAMETERS, 4, 16 / 4),
    ],
)
def test_states_in_host_memory_are_stepped_there_and_leave_the_device(zero, offload, copied, host):
    strategy = Strategy(dp=4, zero=zero, offload=offload)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=strategy)
    model = host_costs()
    assert model.prices_offloading
    price = model.priced_layer(0, strategy, setting)
    shard = LAYER_PARAMETERS / 4
    sync = {term.name: term for term in price.sync_terms}
    assert "optimizer" not in sync
    # Four layers of a rank step together: what a step takes before any parameter is paid once.
    assert sync["optimizer on the host"].value == pytest.approx(1e-4 / 4 + shard * HOST_SECONDS)
    assert sync["offloading gradients and weights"].value == pytest.approx(shard * copied / 4e9)
    assert {sync[name].source for name in sync} == {"measured"}
    assert sum(term.value for term in price.sync_terms) == pytest.approx(price.cost.sync_seconds)
    assert sum(term.value for term in price.state_terms) == price.cost.state_bytes
    assert price.host_bytes == LAYER_PARAMETERS * host
    plain = model.priced_layer(0, replace(strategy, offload=Offload.NONE), setting)
    held, before = ({term.name: term.value for term in found.state_terms} for found in (price, plain))
    assert held["optimizer states"] == 0 and held["gradients"] == before["gradients"]
    assert held["weights"] == (0 if offload is Offload.PARAMETERS else before["weights"])
    fetched = [term for term in price.micro_batch_terms if term.name.endswith("offloading")]
    assert {term.source for term in fetched} <= {"measured"}
    assert [term.value for term in fetched] == [pytest.approx(shard * 4 / 4e9)] * (
        2 if offload is Offload.PARAMETERS else 0
    )
    assert sum(term.value for term in price.micro_batch_terms) == pytest.approx(price.cost.micro_batch_seconds)
    assert plain.host_bytes == 0


def test_offloading_has_no_price_without_a_measured_step_or_a_known_host():
    strategy = Strategy(dp=4, zero=1, offload=Offload.OPTIMIZER)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=strategy)
    without_host = MeasuredCostModel(MODEL, FOUR_RANKS, host_costs().profile, RunOptions())
    for model in (host_costs(host_steps=()), without_host):
        assert not model.prices_offloading
        assert model.layer_cost(0, strategy, setting).transient_bytes == UNAVAILABLE_BYTES
        assert model.embedding_cost(setting).transient_bytes == UNAVAILABLE_BYTES


def test_what_overlaps_hides_behind_computation():
    strategy = Strategy(dp=4, zero=3)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=4, micro_batches=2, base=strategy)
    options = RunOptions(implementation="local", overlap_gradients=True)
    hidden = MeasuredCostModel(MODEL, FOUR_RANKS, PROFILE, options).priced_layer(0, strategy, setting)
    plain = costs().priced_layer(0, strategy, setting)
    assert 4e-3 < hidden.forward_seconds == plain.forward_seconds
    assert 8e-3 < hidden.backward_seconds < plain.backward_seconds
    assert {term.source for term in hidden.micro_batch_terms if "sharded" in term.name} == {"modelled"}


def test_the_optimizer_line_is_found_and_never_negative():
    line = fit_steps([point for point in PROFILE.steps if point.zero == 0])
    assert line.seconds(30, 3_000_000) == pytest.approx(30 * 1e-5 + 3_000_000 * 2e-9, rel=1e-6)
    odd = [
        StepPoint(tensors=10, parameters=10, updated=10, zero=0, seconds=5.0),
        StepPoint(tensors=20, parameters=20, updated=20, zero=0, seconds=1.0),
    ]
    fitted = fit_steps(odd)
    assert min(fitted.constant_seconds, fitted.seconds_per_tensor, fitted.seconds_per_update) >= 0


def test_a_profile_without_an_optimizer_is_refused():
    with pytest.raises(DescriptionError, match="optimizer"):
        costs(steps=())


@pytest.mark.parametrize(("processors", "micro_batches", "share"), [(4, 8, 1.0), (2, 8, 8 / 9), (1, 1, 0.5)])
def test_a_pipeline_of_ranks_that_share_processors_does_not_pay_for_waiting(processors, micro_batches, share):
    place = replace(PROFILE.provenance, processors_per_node=processors)
    setting = Setting(
        pp=2, virtual_stages=1, micro_batch_size=1, micro_batches=micro_batches, base=Strategy(dp=2)
    )
    price = costs(provenance=place).layer_cost(0, Strategy(dp=2), setting)
    assert price.micro_batch_seconds == pytest.approx(3e-3 * share)


def test_a_step_pays_the_small_reductions_of_megatrons_loop():
    assert costs().step_overhead_seconds() == pytest.approx(3 * (LATENCY + 1024 * PER_BYTE))
    assert costs(collectives=()).step_overhead_seconds() == 0


def test_engines_of_zero_take_processor_time_where_that_was_measured():
    engines = tuple(
        EnginePoint(part=part, zero=3, forward_seconds=2e-3, backward_seconds=5e-3) for part in (DIGEST, HEAD)
    )
    for strategy, more in (
        (Strategy(dp=4, zero=3), (2e-3, 5e-3)),
        # Recomputation runs the forward pass's hooks again.
        (Strategy(dp=4, zero=3, recompute=Recompute.FULL), (2e-3, 7e-3)),
        (Strategy(dp=4, zero=2), (0.0, 0.0)),
        (Strategy(dp=4, zero=1), (0.0, 0.0)),
    ):
        setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=strategy)
        plain, charged = (costs(engines=points).priced_layer(0, strategy, setting) for points in ((), engines))
        added = (
            charged.forward_seconds - plain.forward_seconds,
            charged.backward_seconds - plain.backward_seconds,
        )
        assert added == pytest.approx(more)
        assert sum(t.value for t in charged.micro_batch_terms) == pytest.approx(
            charged.cost.micro_batch_seconds
        )
    base = Strategy(dp=4, zero=3)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=8, base=base)
    head, embedding = (
        costs(engines=engines).priced_head(setting),
        costs(engines=engines).priced_embedding(setting),
    )
    assert {t.name: t.value for t in head.micro_batch_terms}["backward ZeRO engine"] == pytest.approx(5e-3)
    assert not [t for t in embedding.micro_batch_terms if "engine" in t.name]
    failed = (EnginePoint(part=DIGEST, zero=3, failure="large"),)
    assert costs(engines=failed).priced_layer(0, base, setting) == costs().priced_layer(0, base, setting)
