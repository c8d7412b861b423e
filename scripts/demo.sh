#!/usr/bin/env bash
# The full pipeline on a toy dataset, from text to a tuned model that answers (`make lora` without ARGS):
# demo.sh [--version 4|7]. Every command is printed, so that it can be repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
py=${PY:-.venv/bin/python}
out=${OUT:-out/demo}
question="What is LoRA?"
case "$*" in  # settings with which the model answers; see docs/decisions/025-demo-corpus.md
  '' | '--version 7') version=7 width=128 pretraining='--lr_init 4e-3 --lr_final 1e-3 --warmup_steps 20' r=32 steps=500 ;;
  '--version 4') version=4 width=96 pretraining='--lr_init 8e-3 --lr_final 2e-3' r=48 steps=750 ;;
  -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
  *)
    echo "error: $*: the demo takes only --version 4 or --version 7" >&2
    exit 1
    ;;
esac

bold='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
lib=''  # printed before a command where $py alone would not find this checkout
[ "$("$py" -I -c 'import rwkv; print(rwkv.__path__[0])' 2>/dev/null)" = "$PWD/rwkv" ] || lib=" PYTHONPATH=$(printf %q "$PWD")"
run() { printf '$%s%s\n' "$lib" "$(printf ' %q' "$@")"; "$@"; }
ask() {  # print the model's answer on one line, without the note that it was cut off
  "$py" scripts/generate.py --model "$1" --ask "$question" --temperature 0 --max_tokens 40 2> >(grep -v "^\[cut off" >&2) | tr '\n' ' '
}
loss() {  # print the loss of the first step and the mean of the last 10 %, as the run reports them
  "$py" - "$1" <<'END'
import json, sys
losses = [json.loads(line)["loss"] for line in open(sys.argv[1])]
tail = losses[-max(1, len(losses) // 10):]
print(f"{losses[0]:.2f} -> {sum(tail) / len(tail):.2f}")
END
}

heading "1. Pretraining text: documentation from Python's standard library"
run "$py" scripts/demo_corpus.py "$out/corpus.jsonl"

heading "2. Conversion: text to tokens, World vocabulary, binidx format"
run "$py" scripts/convert.py --input "$out/corpus.jsonl" --force
run "$py" scripts/convert.py --input data/example.jsonl --output-prefix "$out/example" --force

heading "3. Pretraining: a new, tiny RWKV-$version model"
# shellcheck disable=SC2086  # several flags
run "$py" scripts/pretrain.py --data_file "$out/corpus_text_document" --proj_dir "$out/base" --overwrite --version "$version" --n_layer 2 --n_embd "$width" \
  --ctx_len 128 --micro_bsz 3 --epoch_count 1 --epoch_steps 300 $pretraining --magic_prime -1 --random_seed 1 --precision fp32

heading "4. LoRA: the base is frozen, an adapter learns the 40 questions and answers in data/example.jsonl"
run "$py" scripts/lora.py --load_model "$out/base/rwkv-0.pth" --data_file "$out/example_text_document" --proj_dir "$out/lora" --overwrite \
  --lora_r "$r" --lora_alpha "$r" --lora_dropout 0 --lora_parts att,ffn,time,ln \
  --ctx_len 64 --micro_bsz 2 --epoch_count 1 --epoch_steps "$steps" --lr_init 8e-3 --lr_final 1e-3 --random_seed 2 --precision fp32

heading "5. Merging: the adapter is added to the weights"
run "$py" scripts/merge_lora.py --adapter "$out/lora/rwkv-0.pth" --output "$out/tuned.pth" --force

heading "6. Result"
before=$(ask "$out/base/rwkv-0.pth")
after=$(ask "$out/tuned.pth")
cat <<EOF
models:  $out/tuned.pth; its base $out/base/rwkv-0.pth and adapter $out/lora/rwkv-0.pth; loss curves in $out/*/loss.png
loss:    pretraining $(loss "$out/base/metrics.jsonl"), LoRA $(loss "$out/lora/metrics.jsonl") nats per token
before:  $question $before
after:   $question $after
next:    $("$py" -c 'import sys; from rwkv.commands import command; print(command("lora", *sys.argv[1:]))' \
  --load_model YOUR_MODEL.pth --data_file YOUR_TEXT.jsonl --epoch_count 1 --micro_bsz 1 --lr_init 1e-4 --lr_final 1e-4)
EOF
