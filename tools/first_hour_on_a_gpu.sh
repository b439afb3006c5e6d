#!/usr/bin/env bash
# What is said here of a GPU, checked on one of 80 GB in an hour, offline; it stops at the first
# difference. Times in comments are guesses for an H100: nobody has run it on a GPU yet.
#
#     bash tools/first_hour_on_a_gpu.sh               # fills out/first-hour/table.md
#     bash tools/first_hour_on_a_gpu.sh --rehearse    # the same with small models, on a CPU: 2 minutes
#
# PYTHON (default .venv/bin/python) runs it; OUT (default out/first-hour) is a folder to write.
set -euo pipefail
case "$*" in
    "") rehearse= ;;
    --rehearse) rehearse=1 ;;
    *)
        echo "usage: bash tools/first_hour_on_a_gpu.sh [--rehearse]" >&2
        exit 2
        ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-out/first-hour}
export HF_HUB_OFFLINE=1

lora="--lora-rank 64 --gradient-checkpointing --ema 0"
one="--guidance 1 --student-steps 1 --warmup 0 --sample-every 0 --prompts $out/prompts.txt"
if [[ $rehearse ]]; then
    large="--model tiny-sdxl --lora-rank 4 --head-width 8"
    whole="--model tiny-sd3 --head-width 8"
    benched=("--model tiny-sdxl --head-width 8 --batch-size 4")
    timing="--repeats 5 --warm-up 1"
    pairs="--count 32 --steps 4"
    adp="--iterations 6 --mse-iterations 4 --batch-size 4"
    adm="--iterations 2 --warmup 1 --batch-size 4"
    images=26
    scores="24.42 3 0.438 0.05"  # of these few iterations on a CPU; the noise is ours
else
    large="--model sdxl --random-init $lora"
    whole="--model sd3 --random-init --lora-rank 0 --gradient-checkpointing --offload --ema 0"
    benched=(
        "--model sdxl --random-init $lora --batch-size 8"
        "--model sd3 --random-init $lora --batch-size 8"
        "--model cogvideox-5b --random-init $lora --batch-size 1"
    )
    timing="--repeats 10 --warm-up 2"
    pairs="--count 1700"
    adp="--iterations 150 --mse-iterations 120 --ema 0"
    adm=
    images=255
    # These commands on a CPU: CLIP and distance to the teacher, each with half of its 95% interval
    # (seed 0; of the teacher itself CLIP is 60.43, of a student that has not learnt 44.12, 0.214).
    scores="57.35 9.9 0.0714 0.0367"
fi
if [[ -e "$out" ]]; then
    echo "first_hour_on_a_gpu.sh: $out is there: move it away, or set OUT" >&2
    exit 2
fi
if ! command -v "$python" >/dev/null; then
    echo "first_hour_on_a_gpu.sh: no Python at $python: set PYTHON" >&2
    exit 2
fi

say() { printf '\n== %s\n' "$*"; }
check() { "$python" tools/first_hour.py "$@"; }

say "a GPU (seconds)"
[[ $rehearse ]] || check device

mkdir -p "$out"
printf 'a red fox\ntwo dogs on a hill\n' >"$out/prompts.txt"

# What a command says goes into a log of its own; it is shown where the command fails.
run() {
    local log="$out/$1.log"
    shift
    "$python" "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
}

say "two iterations of $large, and the same stopped and resumed (10 minutes)"
# Without CFG the fake score is the teacher bit by bit, if precision is what it should be.
two="$large $one --batch-size 2 --iterations 2"
run large tools/first_hour.py waits $two --out "$out/large"
tail -n 1 "$out/large.log"
check start "$out/large" $two
run stopped adm.py $two --iterations 1 --out "$out/resumed"
run resumed adm.py $two --out "$out/resumed" --resume
check resumed "$out/large" "$out/resumed"

say "its export, opened by stock diffusers (1 minute)"
check opens "$out/large"

say "every network whole: $whole (5 minutes)"
two="$whole $one --batch-size 1 --iterations 2 --checkpoint-every 100"
run whole adm.py $two --out "$out/whole"
check start "$out/whole" $two

say "what an iteration costs (20 minutes)"
for flags in "${benched[@]}"; do
    name=$(echo "$flags" | cut -d' ' -f2)
    "$python" tools/bench.py $flags $timing --prompts "$out/prompts.txt" --json \
        >"$out/bench-$name.json" 2>"$out/bench-$name.log" || { tail -n 20 "$out/bench-$name.log" >&2; exit 1; }
    check bench "$out/bench-$name.json" "$out/table.md" $flags
done

say "DMDX on the digits, scored as on a CPU (10 minutes)"
sample="tools/sample.py --prompts toy/digits-prompts.txt --batch-size 65 --count $images"
run pairs data.py pairs $pairs --out "$out/pairs"
run adp adp.py --pairs "$out/pairs" $adp --sample-every 0 --out "$out/adp"
run adm adm.py --init "$out/adp" --student-steps 1 $adm --sample-every 0 --out "$out/adm"
run student $sample --pipeline "$out/adm/pipeline" --out "$out/images/student"
run teacher $sample --pipeline digits --out "$out/images/teacher"
run scores tools/score.py "$out/images/student" "$out/images/teacher" --out "$out/scores" \
    --metrics clip,distance --clip toy/digits-clip --features toy/digits-clip
check digits "$out/scores" $scores

say "all as expected. For the empty table of tools/README.md:"
cat "$out/table.md"
