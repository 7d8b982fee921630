#!/usr/bin/env bash
# From nothing to a training run under a searched plan, on this machine's processors: measures the ranks, searches
# a plan, trains a small GPT in Megatron's own loop and shows the prediction beside the measurement.
# Wants an environment with the package (`make demo` makes one). DEMO_RANKS says how many ranks to start.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RANKS=${DEMO_RANKS:-$("$PYTHON" -c 'import os; print(2 if len(os.sched_getaffinity(0)) > 1 else 1)')}
OUT=out/demo
mkdir -p "$OUT/profiles"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR

job=(
  launch/pretrain_small.py
  --num-layers 4 --hidden-size 256 --num-attention-heads 8 --seq-length 128 --max-position-embeddings 128
  --global-batch-size 16 --train-iters 30 --lr 2e-3 --lr-decay-style constant --clip-grad 1.0
  --hidden-dropout 0 --attention-dropout 0 --vocab-size 511 --tokenizer-type NullTokenizer --mock-data
  --eval-iters 0 --eval-interval 1000 --log-interval 5
  --galvatron-auto --galvatron-device cpu
  --galvatron-profile-dir "$OUT/profiles" --galvatron-report "$OUT/report.json"
)
echo "demo: $RANKS ranks on the processors of this machine; everything Megatron says goes to $OUT/training.log"
rm -f "$OUT/report.json"
set +e
"$PYTHON" -m torch.distributed.run --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 \
  "${job[@]}" 2>&1 | tee "$OUT/training.log" |
  awk '/^=+ galvatron/ { block = 1 }
       block || /^galvatron|^profiling/ { print; fflush() }
       # Of the lines of Megatron itself, which are long and run into each other: step, time and loss.
       match($0, /iteration +[0-9]+\/ *[0-9]+/) {
         step = substr($0, RSTART, RLENGTH); gsub(/ +/, "", step); sub(/iteration/, "", step)
         match($0, /elapsed time per iteration \(ms\): [0-9.]+/); time = substr($0, RSTART, RLENGTH)
         match($0, /lm loss: [0-9.E+-]+/); loss = substr($0, RSTART, RLENGTH)
         printf "iteration %5s | %s | %s\n", step, time, loss; fflush()
       }
       /^=+$/ { block = 0 }'
status=${PIPESTATUS[0]}
set -e
if [ "$status" -ne 0 ]; then
  echo "demo: training ended with code $status, see $OUT/training.log" >&2
  exit "$status"
fi
exec "$PYTHON" launch/demo_table.py "$OUT/report.json"
