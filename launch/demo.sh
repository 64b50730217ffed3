#!/usr/bin/env bash
# The walk through the program that `make demo` takes. Every step is an ordinary command, printed before it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
stop_at=150  # between two checkpoints, so that the stop itself must save

heading() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() { printf '\033[36m$ %s\033[0m\n' "$*"; "$@"; }
passed_step() { grep -q "\"event\": \"step\", \"step\": $1," "$run/metrics.jsonl" 2>/dev/null; }

heading "1/5 pack: 53 annotated images -> WebDataset shards with an index"
show python -m data_tools pack coco_panoptic data_tools/sample/coco_panoptic data/demo/train --split train
show python -m data_tools pack coco_panoptic data_tools/sample/coco_panoptic data/demo/val --split val

heading "2/5 train: 2 processes under DeepSpeed ZeRO-2; SIGTERM in the middle, then it resumes by itself"
printf '\033[36m$ launch/local.sh configs/demo.yaml --processes 2\033[0m\n'
bash launch/local.sh configs/demo.yaml --processes 2 &
training=$!
trap 'kill -TERM "$training" 2>/dev/null || true; wait "$training" || true' EXIT
if ! passed_step "$stop_at"; then
  while kill -0 "$training" 2>/dev/null && ! passed_step "$stop_at"; do sleep 0.5; done
  # As a preemption does: a signal to a rank. The ranks agree to stop, commit their state and exit with 85.
  if kill -0 "$training" 2>/dev/null; then
    read -r rank_0 _ < "$run/.lock"
    printf '\033[36m$ kill -TERM %s\033[0m   (rank 0)\n' "$rank_0"
    kill -TERM "$rank_0"
  fi
fi
wait "$training"
trap - EXIT

heading "3/5 evaluate: the training images it has seen, and 13 it has not"
show mf-scale evaluate "$run" --split train --processes 2
show mf-scale evaluate "$run" --split val --processes 2

heading "4/5 predict: overlays with class names, raw maps, segment lists"
show mf-scale predict data_tools/sample/coco_panoptic/val --run "$run" --out "$run/predictions"

heading "5/5 report"
show mf-scale report "$run"
python - "$run" <<'PY'
import json, pathlib, sys
found = json.loads(pathlib.Path(sys.argv[1], "report", "evaluation-train.json").read_text())["mIoU"]
if found < 0.30:
    sys.exit(f"the demo should reach mIoU 0.30 on its training images, it reached {found:.3f}")
PY
