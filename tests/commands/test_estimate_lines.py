"""``galvatron estimate`` of command lines as jobs have them, unknown flags and all."""

import json

import pytest

from galvatron_megatron.cli import main

JOB = (
    "--lr 1.5e-4 --train-iters 1000 --data-path /data/text --split 949,50,1 --save /checkpoints --bf16 "
    "--attention-dropout 0 --hidden-dropout 0 --use-mcore-models --use-distributed-optimizer "
)
LLAMA = (
    "pretrain_gpt.py --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 "
    "--group-query-attention --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --rotary-base 500000 --tensor-model-parallel-size 8 "
    "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 --sequence-parallel "
    "--overlap-grad-reduce --overlap-param-gather --micro-batch-size 1 --global-batch-size 128 "
    "--tokenizer-type Llama3Tokenizer --tokenizer-model /data/tok.model --attention-backend flash " + JOB
)
GPT = (
    "pretrain_gpt.py --num-layers 40 --hidden-size 5120 --num-attention-heads 40 --seq-length 2048 "
    "--max-position-embeddings 2048 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 "
    "--micro-batch-size 2 --global-batch-size 256 --fp16 --vocab-file vocab.json --merge-file merges.txt "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --lr 1e-4 "
    "--train-samples 1000000"
)
MIXTRAL = (
    "pretrain_gpt.py --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 32768 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall "
    "--tokenizer-type Llama2Tokenizer --tokenizer-model tok --micro-batch-size 1 --global-batch-size 256 "
    "--pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --sequence-parallel " + JOB
)
DEEPSEEK = (
    "pretrain_gpt.py --num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 --num-attention-heads 16 "
    "--multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 "
    "--qk-layernorm --normalization RMSNorm --swiglu --disable-bias-linear --seq-length 4096 "
    "--max-position-embeddings 4096 --position-embedding-type rope --rotary-scaling-factor 40 --mscale 0.707 "
    "--untie-embeddings-and-output-weights --num-experts 64 --moe-layer-freq ([0]+[1]*26) "
    "--moe-ffn-hidden-size 1408 --moe-grouped-gemm --moe-router-topk 6 --moe-shared-expert-intermediate-size "
    "2816 --moe-token-dispatcher-type flex --moe-enable-deepep --moe-permute-fusion --micro-batch-size 1 "
    "--global-batch-size 1024 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model deepseek-ai/DeepSeek-V2-Lite " + JOB
)
HYBRID = (
    "pretrain_hybrid.py --hybrid-layer-pattern M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M- "
    "--hidden-size 4096 --ffn-hidden-size 21504 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --kv-channels 128 --mamba-num-groups 8 --mamba-state-dim 128 --squared-relu "
    "--disable-bias-linear --normalization RMSNorm --position-embedding-type none --seq-length 8192 "
    "--untie-embeddings-and-output-weights --max-position-embeddings 8192 --tensor-model-parallel-size 8 "
    "--sequence-parallel --micro-batch-size 1 --global-batch-size 64 --overlap-grad-reduce "
    "--tokenizer-type TikTokenizer --tokenizer-model tok " + JOB
)


def estimated(line: str, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict, str]:
    assert main(["estimate", "--cluster", "h100", "--nodes", "4", *flags, "--json", "--", *line.split()]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), " ".join(told.err.split())


@pytest.mark.parametrize(
    ("line", "flags", "assumed"),
    [
        (LLAMA, (), "Llama3Tokenizer: its files are not at hand; 128256 entries are assumed"),
        (GPT, (), "GPT2BPETokenizer: its files are not at hand; 50257 entries are assumed"),
        (MIXTRAL, (), "Llama2Tokenizer: its files are not at hand; 32000 entries are assumed"),
        (DEEPSEEK, ("--vocab-size", "102400"), ""),
        (HYBRID, (), ""),
    ],
    ids=["llama", "gpt", "mixtral", "deepseek", "hybrid"],
)
def test_a_line_as_it_stands(
    line: str, flags: tuple[str, ...], assumed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document, told = estimated(line, capsys, *flags)
    assert document["fits"]
    assert 0.2 < document["model_flops_utilization"] < 0.65
    assert assumed in told
    assert bool(told) == bool(assumed)
    terms = {term["name"] for stage in document["stages"] for term in stage["micro_batch_terms"]}
    assert ("forward expert parallel" in terms) == ("--expert-model-parallel-size" in line)


def test_a_vocabulary_that_nothing_tells_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--cluster", "h100", "--nodes", "4", "--", *DEEPSEEK.split()]) == 2
    assert "--vocab-size" in capsys.readouterr().err


def test_switches_of_the_line_are_priced(capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = estimated(MIXTRAL, capsys)
    narrow, _ = estimated(f"{MIXTRAL} --grad-reduce-in-bf16", capsys)
    size = {
        (name, term["name"]): term["value"]
        for name, document in (("plain", plain), ("narrow", narrow))
        for term in document["stages"][0]["memory_terms"]
    }
    assert size["narrow", "gradients"] * 2 == size["plain", "gradients"]
    instances, _ = estimated(f"{MIXTRAL} --num-distributed-optimizer-instances 2", capsys)
    assert instances["memory_gb"][0] > plain["memory_gb"][0]
    local, _ = estimated(f"{MIXTRAL} --transformer-impl local", capsys)
    assert local["memory_gb"][0] > plain["memory_gb"][0]
