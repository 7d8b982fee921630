"""The analytic cost model: sums of terms, and what must get cheaper or dearer."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.model import Experts, Layer
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy
from tests.cost.machines import cluster, costs, model, setting

STRATEGIES = [
    Strategy(dp=8),
    Strategy(dp=8, zero=1),
    Strategy(dp=8, zero=2),
    Strategy(dp=8, zero=3),
    Strategy(tp=4, dp=2),
    Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.MEGATRON),
    Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.ULYSSES, zero=3),
    Strategy(tp=2, cp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON),
    Strategy(dp=8, recompute=Recompute.SELECTIVE),
    Strategy(dp=8, recompute=Recompute.FULL),
    Strategy(dp=8, zero=1, offload=Offload.OPTIMIZER),
    Strategy(dp=8, zero=3, offload=Offload.PARAMETERS),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_terms_add_up(strategy: Strategy) -> None:
    priced = costs().priced_layer(0, strategy, setting(strategy))
    cost = priced.cost
    assert sum(term.value for term in priced.micro_batch_terms) == pytest.approx(cost.micro_batch_seconds)
    assert priced.forward_seconds + priced.backward_seconds == pytest.approx(cost.micro_batch_seconds)
    assert sum(term.value for term in priced.sync_terms) == pytest.approx(cost.sync_seconds)
    assert sum(term.value for term in priced.state_terms) == cost.state_bytes
    assert sum(term.value for term in priced.activation_terms) + priced.slack_bytes == cost.activation_bytes
    assert min(term.value for term in (*priced.micro_batch_terms, *priced.sync_terms)) >= 0


def test_zero_stages_trade_memory_for_time() -> None:
    price = costs()
    priced = [price.layer_cost(0, Strategy(dp=8, zero=zero), setting(Strategy(dp=8))) for zero in range(4)]
    assert [cost.state_bytes for cost in priced] == sorted((cost.state_bytes for cost in priced), reverse=True)
    assert len({cost.state_bytes for cost in priced}) == 4
    assert priced[3].micro_batch_seconds > priced[0].micro_batch_seconds
    assert priced[1].sync_seconds < priced[0].sync_seconds


def test_state_bytes_are_megatrons() -> None:
    """18 bytes a parameter for bf16, 6 + 12/d with the distributed optimizer."""
    price = costs()
    parameters = 2048 * (4 * 2048 + 3 * 4096) + 2 * 2048
    plain = price.layer_cost(0, Strategy(dp=8), setting(Strategy(dp=8)))
    sharded = price.layer_cost(0, Strategy(dp=8, zero=1), setting(Strategy(dp=8)))
    assert plain.state_bytes == 18 * parameters
    assert sharded.state_bytes == 6 * parameters + 12 * parameters // 8


def test_recomputation_saves_activations_and_costs_time() -> None:
    price = costs(fused_attention=False)
    none, selective, full = (
        price.layer_cost(0, Strategy(dp=8, recompute=mode), setting(Strategy(dp=8)))
        for mode in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    )
    assert none.activation_bytes > selective.activation_bytes > full.activation_bytes
    assert none.micro_batch_seconds < selective.micro_batch_seconds < full.micro_batch_seconds
    # One more forward pass is about a third of forward and backward.
    assert full.micro_batch_seconds / none.micro_batch_seconds == pytest.approx(4 / 3, rel=0.1)


def test_sequence_parallelism_saves_activations() -> None:
    price = costs()
    plain, sequence = (
        price.layer_cost(0, Strategy(tp=4, dp=2, sequence_parallel=kind), setting(Strategy(tp=4, dp=2)))
        for kind in (SequenceParallel.NONE, SequenceParallel.MEGATRON)
    )
    assert sequence.activation_bytes < plain.activation_bytes


def test_price_depends_on_the_layer_not_on_its_index_or_the_base() -> None:
    price, strategy = costs(), Strategy(tp=2, dp=4)
    other_base = replace(setting(strategy), base=Strategy(tp=4, dp=2), micro_batch_size=4)
    assert price.layer_cost(0, strategy, setting(strategy)) == price.layer_cost(5, strategy, other_base)


def test_resharding() -> None:
    price, place = costs(), setting(Strategy(dp=8))
    wide, deep = Strategy(tp=8, sequence_parallel=SequenceParallel.MEGATRON), Strategy(dp=8)
    assert price.reshard_seconds(1, wide, wide, place) == 0
    assert price.reshard_seconds(1, deep, replace(deep, zero=3, recompute=Recompute.FULL), place) == 0
    assert price.reshard_seconds(1, wide, deep, place) > 0
    assert price.reshard_seconds(1, wide, deep, place) == pytest.approx(
        price.reshard_seconds(1, deep, wide, place)
    )


def test_tied_embeddings() -> None:
    tied, untied = costs(tied_embeddings=True), costs()
    alone, piped = setting(Strategy(dp=8)), setting(Strategy(dp=8), pp=2)
    weight = 18 * untied.model.padded_vocab_size(1) * 2048
    assert untied.head_cost(alone).state_bytes - tied.head_cost(alone).state_bytes == weight
    # With a pipeline the last stage holds a copy, and its gradient is summed with the first stage's.
    assert tied.head_cost(piped).state_bytes == untied.head_cost(piped).state_bytes
    assert tied.head_cost(piped).sync_seconds > untied.head_cost(piped).sync_seconds


def test_sends_cross_nodes_where_the_pipeline_does() -> None:
    price = costs()
    assert price.send_seconds(setting(Strategy(dp=8))) == 0
    inside = price.send_seconds(setting(Strategy(dp=4), pp=2))
    between = price.send_seconds(setting(Strategy(dp=8), pp=2))
    assert between > 3 * inside > 0


def test_overlap_hides_gradient_reduction() -> None:
    place = setting(Strategy(dp=8), micro_batch_size=4)
    plain = costs().layer_cost(0, Strategy(dp=8, zero=1), place)
    hidden = costs(options=RunOptions(overlap_gradients=True, overlap_parameters=True)).layer_cost(
        0, Strategy(dp=8, zero=1), place
    )
    assert hidden.sync_seconds < plain.sync_seconds
    assert hidden.micro_batch_seconds == plain.micro_batch_seconds


def test_scattered_sends_are_cheaper_between_nodes() -> None:
    place = setting(Strategy(tp=8), pp=2)
    plain = costs().send_seconds(place)
    assert costs(options=RunOptions(scatter_gather_sends=True)).send_seconds(place) < plain / 3


@given(
    samples=st.sampled_from([1, 2, 4, 8]),
    tp=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(["a100-80g", "h100", "b200", "l4", "v100"]),
)
def test_more_samples_cost_more_but_less_each(samples: int, tp: int, name: str) -> None:
    price = AnalyticCostModel(model(), cluster(name))
    strategy = Strategy(tp=tp)
    one, two = (
        price.layer_cost(0, strategy, setting(strategy, micro_batch_size=count))
        for count in (samples, 2 * samples)
    )
    assert one.micro_batch_seconds < two.micro_batch_seconds * 1.0000001
    assert two.micro_batch_seconds <= 2.2 * one.micro_batch_seconds
    assert one.activation_bytes < two.activation_bytes
    assert one.state_bytes == two.state_bytes


def test_operators_add_up_to_the_layer() -> None:
    price, strategy = costs(), Strategy(tp=2, dp=4)
    operators = price.operator_seconds(0, strategy, setting(strategy, micro_batch_size=8))
    priced = price.priced_layer(0, strategy, setting(strategy, micro_batch_size=8))
    assert sum(pair[0] for pair in operators.values()) == pytest.approx(priced.forward_seconds)
    assert sum(pair[1] for pair in operators.values()) == pytest.approx(priced.backward_seconds)


def test_flops_of_a_sample() -> None:
    """6 per parameter and token, and the causal half of attention."""
    price = costs()
    layers = 8 * (2048 * (4 * 2048 + 3 * 4096))
    head = price.model.padded_vocab_size(1) * 2048
    attention = 8 * 12 * 2048 * 2048 * 2048 / 2 * (7 / 6)
    assert price.flops_per_sample() == pytest.approx(6 * 2048 * (layers + head) + attention, rel=0.02)


def with_experts(dispatcher: str, options: RunOptions | None = None) -> AnalyticCostModel:
    experts = Experts(count=8, top_k=2, ffn_hidden_size=4096, dispatcher=dispatcher)
    block = model().layers[0]
    layer = Layer(kind=LayerKind.MOE_BLOCK, attention=block.attention, experts=experts)
    return AnalyticCostModel(replace(model(), layers=(layer,)), cluster(), options)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall", "flex"])
def test_expert_parallelism_saves_states_and_costs_exchanges(dispatcher: str) -> None:
    price = with_experts(dispatcher)
    priced = [
        price.priced_layer(0, Strategy(dp=8, expert_parallel=ep), setting(Strategy(dp=8))) for ep in (1, 2, 8)
    ]
    expert_bytes = 18 * 8 * 3 * 4096 * price.model.hidden_size
    states = [one.cost.state_bytes for one in priced]
    assert states[0] - states[1] == expert_bytes // 2
    assert states[0] - states[2] == expert_bytes * 7 // 8
    exchanged = [sum(term.value for term in one.micro_batch_terms if "parallel" in term.name) for one in priced]
    assert exchanged[0] == 0 < exchanged[1] < exchanged[2]
    reduced = [next(t.value for t in one.sync_terms if t.name == "gradient reduction") for one in priced]
    assert reduced[0] > reduced[1] > reduced[2]
    if dispatcher == "allgather":
        sent = with_experts("alltoall").priced_layer(
            0, Strategy(dp=8, expert_parallel=8), setting(Strategy(dp=8))
        )
        # All tokens to all ranks is more than two copies of each.
        assert sent.cost.micro_batch_seconds < priced[2].cost.micro_batch_seconds


def test_instances_of_the_optimizer_keep_more_states() -> None:
    strategy = Strategy(dp=8, zero=1, expert_parallel=2)
    one, two = (
        with_experts("alltoall", RunOptions(optimizer_instances=count)).priced_layer(
            0, strategy, setting(Strategy(dp=8, zero=1))
        )
        for count in (1, 2)
    )
    size = {term.name: term.value for term in one.state_terms}
    assert {term.name: term.value for term in two.state_terms} == size | {
        "optimizer states": 2 * size["optimizer states"]
    }


def test_zero_pays_for_the_collectives_that_its_engines_send() -> None:
    def parts(zero: int, micro_batches: int, recompute: Recompute = Recompute.NONE, **options: object):
        strategy = Strategy(dp=8, zero=zero, recompute=recompute)
        price = costs(options=RunOptions(**options))
        priced = price.priced_layer(0, strategy, setting(strategy, micro_batches=micro_batches))
        terms = {term.name: term.value for term in (*priced.micro_batch_terms, *priced.sync_terms)}
        return [
            terms.get(name, 0.0)
            for name in ("forward sharded parameters", "backward sharded parameters", "gradient reduction")
        ]

    plain = parts(0, 4)
    # Stage 2 sums whole gradients after every micro-batch, also after a single one.
    whole = {"bucket_elements": 10**12}
    assert parts(2, 4, **whole) == parts(2, 1, **whole) == pytest.approx([0.0, plain[2], 0.0])
    # Bucket by bucket, where Megatron without overlap knows no buckets.
    assert plain[2] < parts(2, 4)[1] < 1.1 * plain[2]
    # Megatron's stage 1 scatters: half of the volume. DeepSpeed's sums.
    assert parts(1, 4)[2] < 0.7 * plain[2]
    assert parts(1, 4, deepspeed_zero_1=True, **whole)[2] == pytest.approx(plain[2])
    forward, backward, _ = parts(3, 4)
    assert forward > 0
    # Computed again, a layer is gathered for both at once; the longer pass in front hides no less of it.
    again = parts(3, 4, Recompute.FULL)
    assert again[0] == forward and 0 < again[1] <= backward


def test_parameters_are_gathered_while_the_layer_in_front_computes() -> None:
    def added(pp: int, zero: int = 3) -> list[float]:
        strategy = Strategy(dp=8, zero=zero)
        priced = costs().priced_layer(0, strategy, setting(strategy, pp=pp, micro_batch_size=64))
        return [
            sum(t.value for t in priced.micro_batch_terms if t.name == f"{phase} sharded parameters")
            for phase in ("forward", "backward")
        ]

    one, four = added(1), added(4)
    # A stage's first layer waits; of fewer layers it is a larger part. The head computes in front of the last.
    assert one[0] < 0.8 * four[0]
    reduced = added(1, zero=2)[1] / 2  # an all-reduce is two scatters
    assert one[1] - reduced < 0.8 * (four[1] - reduced)
    # Nothing is gathered; of the last bucket of a stage fewer layers pay a larger part.
    assert added(4, zero=2) == pytest.approx(added(1, zero=2), rel=0.05)


def test_the_embedding_is_waited_for_forward_and_the_head_backward() -> None:
    base = Strategy(dp=8, zero=3)
    price, where = costs(), replace(setting(base, micro_batch_size=64), base=base)
    embedding, head = (
        {term.name: term.value for term in end.micro_batch_terms}
        for end in (price.priced_embedding(where), price.priced_head(where))
    )
    name = "{} sharded parameters"
    # Beside gathering, backward passes reduce gradients, of twice as many bytes, scattered as gathers are.
    reduced = 2 * embedding[name.format("forward")]
    assert embedding[name.format("backward")] < 1.3 * reduced
    assert head[name.format("forward")] < 0.4 * head[name.format("backward")]
