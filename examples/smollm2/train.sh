#!/usr/bin/env bash
# Train a generator for SmolLM2-135M-Instruct on one GPU, from public data, and evaluate it on held-out questions.
#
#   bash train.sh SQUAD NQ_SWAP BOOKS [STEPS]
#
# SQUAD and NQ_SWAP are flat rows {context, question, answer}; BOOKS has the folders `train` and `held-out` with books as
# JSON lines. The base model comes from the package registry. Run it again to resume where it stopped.
set -euo pipefail
squad=$1 nq_swap=$2 books=$3 steps=${4:-1500}
here=$(cd "$(dirname "$0")" && pwd)
base=SmolLM2-135M-Instruct.Q4_1.gguf
python=${PYTHON:-python}

[ -f "$base" ] || ln -s "$("$python" -m gakernels.demo.smollm2)" "$base"
[ -d data/long ] || "$python" "$here/make_data.py" --squad "$squad" --nq-swap "$nq_swap" --books "$books/train" --output data
"$python" -m gakernels pretrain --config smollm2-135m-pretraining --output smollm2-135m-pretrained \
  --set "trainer.steps=$steps" --set "data.sources.books.path=$books/train" --set "data.held_out_path=$books/held-out"
"$python" -m gakernels finetune --config smollm2-135m-finetuning --output smollm2-135m-generator --set "trainer.steps=$steps"
for name in squad nq_swap; do
  "$python" -m gakernels eval docqa --generator smollm2-135m-generator --data "data/held-out/$name.jsonl" \
    --lengths own --part all --style paper --adapted-style plain --new-tokens 16 --dtype bfloat16 \
    --methods closed_book,prompt,adapter,other_adapter --json "report-$name.json"
done
