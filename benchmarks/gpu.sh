#!/usr/bin/env bash
# What to measure where a GPU is, part by part; JSON files go to OUT.
#
#   benchmarks/gpu.sh PART OUT DATA      PART: tests step ways peers learning keys objectives
#   SMALL=1 benchmarks/gpu.sh ...        the same commands at a size for two CPU cores: a rehearsal, no result
#
# DATA is a folder with cifar10-{train,test}.zip and imagenette128-{train,val}.zip. Run it from the checkout.
set -euo pipefail
part=$1 out=$2 data=$3 small=${SMALL:-}
mkdir -p "$out"

python - "$out/$part-machine.json" <<'PY'
import json, platform, subprocess, sys, torch, torchvision
gpu = torch.cuda.is_available()
json.dump({
    "gpu": torch.cuda.get_device_name() if gpu else None, "torch": torch.__version__, "cuda": torch.version.cuda,
    "torchvision": torchvision.__version__, "python": platform.python_version(),
    "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None,
}, open(sys.argv[1], "w"), indent=1)
PY

# One training: a name, then arguments of pretrain; its results.json and metrics.jsonl are kept.
train() {
  local name=$1; shift
  relicctl pretrain --out "$out/runs/$name" --overwrite --quiet "$@" ${tiny[@]+"${tiny[@]}"}
  cp "$out/runs/$name/results.json" "$out/$part-$name.json"
  cp "$out/runs/$name/metrics.jsonl" "$out/$part-$name.jsonl"
}
tiny=()
[ -z "$small" ] || tiny=(--set model.width=0.125 --set data.subset=256 --set optim.batch_size=32 --set optim.epochs=1
                         --set optim.warmup_epochs=0 --set views.large.size=16)
cifar=(--preset cifar10-r18 --data "$data/cifar10-train.zip" --val "$data/cifar10-test.zip" --set data.cache=device)
nette=(--preset imagenette-r18 --data "$data/imagenette128-train.zip" --val "$data/imagenette128-val.zip")

case $part in
  tests)
    pytest -m gpu -n 0 --junitxml "$out/tests.xml" tests/test_gpu.py ;;
  step)
    sizes=(--batch "${BATCH:-256}"); [ -z "$small" ] || sizes=(--batch 2 --repeats 1)
    relicctl bench --preset r50-1000ep --json "${sizes[@]}" > "$out/step-r50.json"
    relicctl bench "${cifar[@]:0:4}" --set views.small.count=0 --set views.large.count=2 --json \
      ${small:+--batch 2 --repeats 1} > "$out/step-cifar.json" ;;
  ways)
    python benchmarks/device_ways.py > "$out/ways.json" ;;
  peers)
    python benchmarks/peers.py > "$out/peers.json" ;;
  learning)  # 10 and 25 minutes of one card: set the epochs from the images a second that part `step` gave
    for epochs in ${EPOCHS:-60 150}; do
      train "cifar-$epochs" "${cifar[@]}" --set optim.epochs="$epochs"
      relicctl linear-eval "$out/runs/cifar-$epochs" --json --quiet > "$out/learning-linear-$epochs.json"
    done ;;
  keys)  # three minutes each
    each=("${cifar[@]}" --set optim.epochs="${EPOCHS:-20}" --set eval.every_epochs="${EPOCHS:-20}")
    [ -z "$small" ] || each=("${cifar[@]}" --set eval.every_epochs=1)
    for key in loss.beta=0 loss.beta=1 loss.beta=5 loss.negatives=10 loss.negatives=64 loss.negatives=all \
               loss.temperature=0.1 loss.temperature=0.2 loss.temperature=0.4 loss.invariance=swapped; do
      [ -z "$small" ] || case $key in loss.negatives=64) continue ;; esac
      train "$key" "${each[@]}" --set "$key"
    done
    for views in "2 0" "4 2" "2 6"; do
      train "views-${views/ /+}" "${each[@]}" --set views.large.count="${views% *}" --set views.small.count="${views#* }"
    done ;;
  objectives)
    each=("${nette[@]}" --set optim.epochs="${EPOCHS:-60}")
    for objective in supervised simclr byol relic relicv2; do
      more=(); case $objective in supervised|byol) ;; *) more=(--set loss.temperature=0.2) ;; esac
      [ $objective != relic ] || more+=(--set views.large.count=2 --set views.small.count=0 --set loss.negatives=all)
      train "$objective" "${each[@]}" --config <(printf 'objective: %s\n' "$objective") ${more[@]+"${more[@]}"}
      relicctl transfer "$out/runs/$objective" --data imagenette="$data/imagenette128-{split}.zip" \
        --set 'data.test_split={imagenette: val}' --protocol logistic --protocol knn --labels all --labels 0.1 --json --quiet \
        --out "$out/runs/$objective-transfer" --overwrite > "$out/objectives-transfer-$objective.json"
    done ;;
  *)
    echo "unknown part $part" >&2; exit 2 ;;
esac
