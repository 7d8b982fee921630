"""The plans whose training is held against one rank of stock Megatron; no torch, no Megatron."""

from itertools import pairwise

STEPS, FEWER, LONG = 6, 4, 10
"""Steps of a plan held against the reference, whose loss falls by 5 % in them; of plans beside those; of the
reference itself and of jobs that stop halfway."""
EVERY = 2
"""Steps between two evaluations, of jobs that evaluate."""
EVALUATION = {"eval-iters": 2, "eval-interval": EVERY}
CLIP = 0.8
"""Gradient norm to which gradients are clipped: below all norms that occur."""

MODERN = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "position-embedding-type": "rope",
    "untie-embeddings-and-output-weights": True,
}
CLASSIC = {"position-embedding-type": "learned_absolute"}
"""Tied embeddings, biases, LayerNorm, GeLU."""
GROUPED = {
    **MODERN,
    "group-query-attention": True,
    "num-query-groups": 2,
    "qk-layernorm": True,
    "vocab-size": 61,
}
"""Two key-value heads, norms inside the heads, a vocabulary that is padded (alike at each tp, or losses would
differ: Megatron's loss counts the padding)."""

ONE_HEAD = {**GROUPED, "num-query-groups": 1, "vocab-size": 62}
"""One key-value head for all."""
TIED = {**MODERN, "untie-embeddings-and-output-weights": None, "vocab-size": 63}
"""Tied embeddings with a padded vocabulary."""
EXPERTS = {
    **MODERN,
    "num-experts": 4,
    "moe-router-topk": 2,
    "moe-ffn-hidden-size": 32,
    "moe-router-load-balancing-type": "seq_aux_loss",
    "moe-aux-loss-coeff": 0.1,
    "moe-z-loss-coeff": 0.01,
}
"""The load is balanced by sequence: a loss that, unlike the one by micro-batch, is equal in every layout."""

LATENT = {
    **MODERN,
    "multi-latent-attention": True,
    "kv-lora-rank": 16,
    "qk-head-dim": 8,
    "qk-pos-emb-head-dim": 8,
    "v-head-dim": 12,
}
"""Keys and values from one latent, with heads of two widths."""

MODELS = {
    "mamba": {
        "arguments": {
            **MODERN,
            "mamba-state-dim": 4,
            "mamba-head-dim": 8,
            "mamba-num-groups": 4,
        },
        "pattern": "M*M-",
        "late_arguments": {"spec": ["mamba_on_cpu", "hybrid_stack_spec"]},
    },
    "latent": {"arguments": {**LATENT, "q-lora-rank": 16, "qk-layernorm": True}},
    "latent-keys": {"arguments": {**LATENT, "rope-type": "rope"}},
    "experts": {"arguments": {**EXPERTS, "moe-layer-freq": "[0,1,1,0]"}, "blocks": "beeb"},
    "experts-exchanged": {
        "arguments": {
            **EXPERTS,
            "moe-token-dispatcher-type": "alltoall",
            "moe-shared-expert-intermediate-size": 32,
            "calculate-per-token-loss": True,
        },
        "blocks": "eeee",
    },
    "experts-hybrid": {"arguments": EXPERTS, "pattern": "*E*E"},
    "modern": {"arguments": MODERN},
    "classic": {"arguments": CLASSIC},
    "grouped": {"arguments": GROUPED},
    "one-head": {"arguments": ONE_HEAD},
    "tied": {"arguments": TIED},
    "hybrid-grouped": {"arguments": {**GROUPED, "qk-layernorm": None}, "pattern": "*-*-"},
    "unclipped": {"arguments": {**MODERN, "clip-grad": 0.0}},
    "decayed": {"arguments": {**MODERN, "lr": 1e-2, "lr-decay-style": "linear", "lr-decay-iters": 8}},
    "token-loss": {"arguments": {**MODERN, "calculate-per-token-loss": True}},
    "hybrid": {"arguments": MODERN, "pattern": "*-*-"},
    "bf16": {"arguments": {**MODERN, "bf16": True}},
    "fp16": {
        "arguments": {
            **MODERN,
            "fp16": True,
            "initial-loss-scale": 2**19,
            "loss-scale-window": 4,
        }
    },
}

RESUMED = ("modern", "bf16", "hybrid", "experts", "mamba", "latent")
"""Models of jobs that stop halfway, or that are as long as those."""

LAYOUTS = ("tp1", "tp2", "tp2+megatron", "tp4", "tp4+megatron")


def case(name, model, base, *stages, pattern=None, **options):
    """One training run: model, base strategy and the strategies of each stage's layers, in words."""
    known = MODELS[model]
    arguments = {"train-iters": STEPS, **known["arguments"], **options.pop("arguments", {})}
    made = {"name": name, "model": model, "base": base, "stages": [list(s) for s in stages], **options}
    made |= {name: known[name] for name in ("blocks", "late_arguments") if name in known}
    if pattern or "pattern" in known:
        made["pattern"] = pattern or known["pattern"]
    return {**made, "arguments": arguments}


def reference(model):
    """The same model on one rank of stock Megatron."""
    evaluation = EVALUATION if model == "modern" else {}
    steps = LONG if model in RESUMED else STEPS
    options = {"arguments": {"train-iters": steps, **evaluation}, "weights_after": (FEWER, STEPS)}
    return case(f"reference-{model}", model, "tp1", ["tp1"] * 4, **options)


def pair_cases():
    """Plans that between them change from every layout to every other one, over every base layout."""
    cases = []
    for position, base in enumerate(LAYOUTS):
        for shift in (position % 4 + 1, (position + 2) % 4 + 1):
            # From the base through all others back to the base, always by the same distance.
            walk = [LAYOUTS[(position + shift * step) % len(LAYOUTS)] for step in range(1, 5)]
            cases.append(case(f"pairs-{position}-{shift}", "modern", base, walk))
    return cases


MIXED = ("tp1", "tp2+megatron", "tp4 recompute-selective", "tp2")

FEATURES = (
    case(
        "sharded-everywhere",
        "modern",
        "tp1 zero1",
        ["tp1 zero1", "tp2 zero1", "tp4 zero1", "tp2+megatron zero1"],
    ),
    case("sharded-in-part", "modern", "tp2", ["tp1 zero1", "tp2", "tp4 zero1", "tp2+megatron"]),
    case("ulysses", "modern", "tp1", ["tp2+ulysses", "tp4+ulysses", "tp1", "tp4+ulysses zero1"]),
    case(
        "ulysses-recomputed",
        "modern",
        "tp2+megatron",
        ["tp4+ulysses recompute-full", "tp2", "tp2+ulysses", "tp1"],
    ),
    case(
        "recompute",
        "modern",
        "tp2",
        [
            "tp4 recompute-full",
            "tp2+megatron recompute-full",
            "tp1 recompute-selective",
            "tp4+megatron recompute-selective",
        ],
    ),
    case("overlapped", "modern", "tp1", MIXED, arguments={"overlap-grad-reduce": True}),
    case(
        "overlapped-gather",
        "modern",
        "tp1 zero1",
        ["tp1 zero1", "tp2 zero1", "tp4+megatron", "tp4+ulysses zero1"],
        arguments={"overlap-grad-reduce": True, "overlap-param-gather": True, **EVALUATION},
    ),
    case("unclipped", "unclipped", "tp2", MIXED),
    case(
        "decayed",
        "decayed",
        "tp2 zero1",
        ["tp1 zero3", "tp2+megatron zero2 offload-optimizer", "tp4 zero1", "tp2"],
    ),
    case("token-loss", "token-loss", "tp1", MIXED),
    case(
        "bucketed",
        "modern",
        "tp1 zero1",
        MIXED,
        arguments={"overlap-grad-reduce": True, "ddp-bucket-size": 500},
    ),
    case("classic", "classic", "tp1", MIXED),
    case("classic-split", "classic", "tp2+megatron", MIXED),
    case("classic-4", "classic", "tp4+megatron zero1", ["tp1", "tp4+megatron", "tp2+megatron zero1", "tp4"]),
    case("classic-pipeline", "classic", "tp2", ["tp1"], ["tp2", "tp2+megatron", "tp1"], pp=2),
    case("classic-pipeline-ulysses", "classic", "tp1", ["tp2+ulysses", "tp1"], ["tp2", "tp2+ulysses"], pp=2),
    case("grouped", "grouped", "tp2", ["tp4+megatron", "tp2+ulysses", "tp4+ulysses", "tp1"]),
    case("grouped-split", "grouped", "tp2+megatron", ["tp2+megatron", "tp4+ulysses", "tp1", "tp4"]),
    case("grouped-4", "grouped", "tp4", ["tp2", "tp1", "tp4+megatron", "tp2+megatron"]),
    case(
        "pipeline",
        "modern",
        "tp2",
        ["tp1", "tp2 recompute-selective"],
        ["tp2+megatron", "tp1 recompute-full"],
        pp=2,
        arguments=EVALUATION,
    ),
    case("pipeline-uneven", "modern", "tp1", ["tp2+megatron", "tp1", "tp2"], ["tp1 zero1"], pp=2),
    case("pipeline-split", "modern", "tp2+megatron zero1", ["tp1", "tp2"], ["tp2+ulysses", "tp1 zero1"], pp=2),
    case(
        "interleaved",
        "modern",
        "tp1",
        ["tp2"],
        ["tp1"],
        ["tp2+megatron"],
        ["tp1 recompute-full"],
        pp=2,
        virtual=2,
        micro_batches=4,
        micro_batch=1,
    ),
    case(
        "interleaved-classic",
        "classic",
        "tp2+megatron",
        ["tp2"],
        ["tp1"],
        ["tp2+megatron"],
        ["tp1"],
        pp=2,
        virtual=2,
        micro_batch=2,
    ),
    case(
        "interleaved-overlapped",
        "modern",
        "tp1 zero1",
        ["tp2 zero1"],
        ["tp1 zero1"],
        ["tp2"],
        ["tp1"],
        pp=2,
        virtual=2,
        micro_batch=1,
        arguments={"overlap-grad-reduce": True, **EVALUATION},
    ),
    case(
        "evaluated-between-shards",
        "modern",
        "tp2 zero1",
        ["tp1 zero3 recompute-full", "tp2+megatron zero2", "tp4 zero3", "tp2+ulysses zero1"],
        arguments={"overlap-grad-reduce": True, "overlap-param-gather": True, **EVALUATION},
    ),
    case("hybrid", "hybrid", "tp1", ["tp1", "tp2", "tp4+megatron", "tp2+megatron"]),
    case("hybrid-attention-apart", "hybrid", "tp2", ["tp4+ulysses", "tp1", "tp4", "tp2 zero1"]),
    case(
        "hybrid-pipeline",
        "hybrid",
        "tp2",
        ["tp2+ulysses", "tp1"],
        ["tp2", "tp1 recompute-full"],
        pp=2,
        pattern="*-|*-",
    ),
    case("hybrid-split", "hybrid", "tp4+megatron", ["tp1 recompute-full", "tp4+megatron", "tp2", "tp4"]),
    case("tied", "tied", "tp4", ["tp1", "tp2+megatron", "tp4", "tp2"]),
    case("tied-sharded", "tied", "tp2 zero1", ["tp4 zero1", "tp1 zero1", "tp2+ulysses zero1", "tp2"]),
    case("tied-pipeline", "tied", "tp2+megatron", ["tp1"], ["tp2", "tp1 zero1", "tp2+megatron"], pp=2),
    case(
        "tied-interleaved",
        "tied",
        "tp2 zero1",
        ["tp1"],
        ["tp2+megatron"],
        ["tp2"],
        ["tp1 zero1"],
        pp=2,
        virtual=2,
        micro_batch=2,
    ),
    case("one-head", "one-head", "tp1", ["tp4+ulysses", "tp2", "tp4", "tp2+megatron"]),
    case("one-head-split", "one-head", "tp4+megatron", ["tp2+ulysses", "tp1", "tp2", "tp4 recompute-full"]),
    case("one-head-pipeline", "one-head", "tp1 zero1", ["tp2+ulysses", "tp2"], ["tp1", "tp2+megatron"], pp=2),
    case("grouped-pipeline", "grouped", "tp2", ["tp1", "tp2+ulysses", "tp2+megatron"], ["tp1"], pp=2),
    case(
        "grouped-interleaved",
        "grouped",
        "tp1",
        ["tp2+megatron"],
        ["tp2"],
        ["tp1"],
        ["tp2+ulysses"],
        pp=2,
        virtual=2,
        micro_batch=2,
    ),
    case(
        "grouped-sharded",
        "grouped",
        "tp1 zero1",
        ["tp4 zero1", "tp2+ulysses zero1", "tp1", "tp4+megatron zero1"],
    ),
    case("classic-sharded", "classic", "tp2 zero1", ["tp2+ulysses", "tp4+megatron zero1", "tp1 zero1", "tp4"]),
    case(
        "classic-recomputed",
        "classic",
        "tp1",
        ["tp2 recompute-full", "tp2+megatron recompute-selective", "tp4+ulysses recompute-selective", "tp1"],
    ),
    case("classic-late", "classic", "tp2", ["tp2", "tp2", "tp1"], ["tp1"], pp=2),
    case("one-layer-differs", "modern", "tp4", ["tp4", "tp4", "tp1", "tp4"]),
    case("sharding-differs", "modern", "tp2", ["tp2 zero1", "tp2", "tp2 zero1", "tp2"]),
    case("recompute-differs", "modern", "tp1", ["tp1", "tp1 recompute-full", "tp1 recompute-selective", "tp1"]),
    case("base-apart", "modern", "tp4+megatron", ["tp1 zero1"] * 4),
    case("base-apart-ulysses", "modern", "tp1 zero1", ["tp4+ulysses zero1"] * 4),
    case("four-stages", "modern", "tp1", ["tp1"], ["tp1 recompute-full"], ["tp1 zero1"], ["tp1"], pp=4),
    case("small-micro-batches", "modern", "tp2", ["tp2+megatron", "tp2+ulysses", "tp4", "tp2"], micro_batch=1),
    case("one-micro-batch", "modern", "tp1", MIXED, micro_batches=1),
    case("hybrid-ulysses", "hybrid", "tp2+megatron", ["tp2+ulysses", "tp4", "tp4+ulysses", "tp1 zero1"]),
    case(
        "hybrid-sharded",
        "hybrid",
        "tp1 zero1",
        ["tp4 zero1", "tp1 zero1", "tp2+megatron zero1", "tp4+megatron zero1"],
    ),
    case(
        "hybrid-interleaved",
        "hybrid",
        "tp1",
        ["tp2"],
        ["tp1"],
        ["tp2+megatron"],
        ["tp2 recompute-full"],
        pp=2,
        virtual=2,
        micro_batch=2,
        pattern="*|-|*|-",
    ),
    case("hybrid-grouped", "hybrid-grouped", "tp2", ["tp4+megatron", "tp1", "tp2+ulysses", "tp4"]),
    case(
        "hybrid-grouped-uneven",
        "hybrid-grouped",
        "tp1",
        ["tp2+ulysses", "tp2", "tp1"],
        ["tp2+megatron"],
        pp=2,
        pattern="*-*|-",
    ),
)

MIXTURES = (
    case("experts", "experts", "tp1", ["tp2", "tp2+megatron", "tp4+megatron", "tp1"]),
    case("experts-apart", "experts", "tp2", ["tp4", "tp1 ep4", "tp4+megatron ep2 etp1", "tp2"]),
    case("experts-split", "experts", "tp2+megatron zero1", ["tp1", "tp1 ep4", "tp2+ulysses ep4 zero1", "tp4"]),
    case(
        "experts-recomputed",
        "experts",
        "tp1",
        ["tp2", "tp4+megatron recompute-full", "tp2+ulysses recompute-selective", "tp1"],
    ),
    case("experts-pipeline", "experts", "tp1", ["tp2", "tp1 ep2"], ["tp2+ulysses ep2", "tp2"], pp=2),
    case("experts-tensor", "experts", "tp1 zero1", ["tp2", "tp1 etp2 zero1", "tp4+megatron etp2 zero1", "tp1"]),
    case(
        "experts-exchanged",
        "experts-exchanged",
        "tp1",
        # With ep and etp above 1 the ranks gather unequal numbers of tokens, which gloo cannot.
        ["tp1 ep2", "tp2+megatron etp1 ep2", "tp4+ulysses ep4", "tp4+megatron etp1 ep2 zero1"],
    ),
    case(
        "experts-exchanged-whole",
        "experts-exchanged",
        "tp2+megatron",
        ["tp1", "tp2+megatron", "tp4+ulysses zero1", "tp4+megatron"],
    ),
    case(
        "experts-hybrid", "experts-hybrid", "tp2+megatron", ["tp4", "tp1 ep2", "tp2", "tp2+ulysses ep2 zero1"]
    ),
    case(
        "experts-hybrid-whole", "experts-hybrid", "tp1", ["tp2+ulysses", "tp4+megatron", "tp1", "tp2+megatron"]
    ),
)

CONTEXT = (
    case("context", "modern", "tp1", ["tp1 cp2", "tp1 cp4", "tp2 cp2", "tp2+megatron cp2"]),
    case(
        "context-recomputed",
        "modern",
        "tp2+megatron zero1",
        ["tp1 cp4 recompute-full", "tp2+ulysses", "tp2+megatron cp2 recompute-selective", "tp1 cp2 zero1"],
    ),
    case("context-grouped", "grouped", "tp4", ["tp2+megatron cp2", "tp1", "tp1 cp4", "tp2 cp2"]),
    case("context-classic", "classic", "tp2", ["tp1 cp2", "tp1"], ["tp2", "tp1 cp2 zero1"], pp=2),
    case("context-hybrid", "hybrid", "tp1", ["tp1 cp4", "tp2", "tp2+megatron cp2", "tp1"]),
    case("context-experts", "experts", "tp1", ["tp1", "tp1 cp4", "tp2+megatron cp2", "tp1 cp2"]),
    case("context-experts-shared-out", "experts", "tp1", ["tp2", "tp1 cp2 ep4", "tp2+ulysses ep4", "tp1 cp4"]),
)

LATENT_PLANS = (
    case("latent", "latent", "tp1", ["tp2", "tp2+megatron", "tp4+megatron recompute-full", "tp4+ulysses"]),
    case(
        "latent-pipeline",
        "latent",
        "tp2+megatron",
        ["tp1", "tp2 recompute-selective", "tp2+ulysses"],
        ["tp1 cp2"],
        pp=2,
    ),
    case("latent-keys", "latent-keys", "tp2", ["tp4", "tp1", "tp1 cp4", "tp2+megatron zero1"]),
)

MAMBA_PLANS = (
    case("mamba", "mamba", "tp1", ["tp2", "tp4+megatron", "tp2+megatron zero1", "tp4"]),
    case(
        "mamba-split", "mamba", "tp2+megatron", ["tp1 recompute-full", "tp2+ulysses", "tp4+megatron", "tp1 cp2"]
    ),
    case(
        "mamba-pipeline",
        "mamba",
        "tp1",
        ["tp2", "tp1", "tp1 zero1"],
        ["tp2+megatron"],
        pp=2,
        pattern="M*M|-",
    ),
)

HALF = (
    case("bf16", "bf16", "tp1", MIXED),
    case(
        "bf16-sharded", "bf16", "tp2+megatron zero1", ["tp4+ulysses zero1", "tp1", "tp4+megatron zero1", "tp2"]
    ),
    case("fp16", "fp16", "tp4 zero1", ["tp4+ulysses", "tp1", "tp4+megatron zero1", "tp2"]),
)
"""Compared within the noise of the precision, and exactly as to which steps were skipped: when gradients
overflow depends on the size of a micro-batch, which is the reference's in the fp16 plan."""


def changes(cases):
    """The pairs of layouts between which plans move activations."""
    found = set()
    for made in cases:
        for stage in made["stages"]:
            words = [made["base"], *stage, made["base"]]
            layouts = [text.split()[0] for text in words]
            found |= {(a, b) for a, b in pairwise(layouts) if a != b}
    return found
