# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
NOW := $(shell date +%Y%m%d-%H%M%S)
DEMO := out/demo-$(NOW)
TOY := out/toy-$(NOW)
QUICK := dmd,step,adm-paper,adm-recipe,adp+dmd,adp+adm-paper
# The images that the demo scores: of these prompts, 15 of each and 45 of "a handwritten digit".
SAMPLE := tools/sample.py --prompts toy/digits-prompts.txt --count 255 --batch-size 85
ROWS := teacher-1-pass ADP-150 DMDX teacher
# ADP so short that stage 2 has work to do: its recipe has 800 iterations.
SHORT := --iterations 150 --mse-iterations 120 --ema 0 --checkpoint-every 50 --keep-checkpoints 3

.PHONY: demo test mutants rehearse rehearse-sdxl toy

demo: $(VENV)/.installed
	$(VENV)/bin/python toy/run.py --iterations 300 --methods $(QUICK) --out $(DEMO)/toy
	$(VENV)/bin/python toy/plot.py $(DEMO)/toy/results.json --out $(DEMO)/toy
	$(VENV)/bin/python data.py pairs --count 1700 --out $(DEMO)/pairs
	$(VENV)/bin/python adp.py --pairs $(DEMO)/pairs $(SHORT) --out $(DEMO)/adp
	$(VENV)/bin/python adm.py --init $(DEMO)/adp --student-steps 1 --checkpoint-every 100 --keep-checkpoints 4 --out $(DEMO)/adm
	$(VENV)/bin/python toy/digits.py gain $(DEMO)/adp $(DEMO)/adm $(DEMO)/gain.png
	$(VENV)/bin/python $(SAMPLE) --pipeline digits --steps 1 --out $(DEMO)/images/teacher-1-pass
	$(VENV)/bin/python $(SAMPLE) --pipeline $(DEMO)/adp/pipeline --out $(DEMO)/images/ADP-150
	$(VENV)/bin/python $(SAMPLE) --pipeline $(DEMO)/adm/pipeline --out $(DEMO)/images/DMDX
	$(VENV)/bin/python $(SAMPLE) --pipeline digits --out $(DEMO)/images/teacher
	$(VENV)/bin/python tools/score.py $(foreach row,$(ROWS),$(DEMO)/images/$(row)) --out $(DEMO)/scores \
		--metrics clip,diversity,distance,frechet --clip toy/digits-clip --features toy/digits-clip
	@printf '%s\n' '' 'The teacher in one step, which blurs; its students, one pass each: after 150 iterations of ADP, and' \
		'after ADM; the teacher in 28 steps with guidance, 56 passes.' \
		'See $(DEMO)/scores/sheet.png and $(DEMO)/gain.png   The table above: $(DEMO)/scores/table.md' \
		'Also: $(DEMO)/toy, $(DEMO)/adm/samples, $(DEMO)/adm/curves.png   The student: $(DEMO)/adm/pipeline' '' '    from diffusers import DiffusionPipeline' \
		'    pipe = DiffusionPipeline.from_pretrained("$(DEMO)/adm/pipeline")' \
		'    image = pipe("a handwritten seven", num_inference_steps=1, guidance_scale=1.0, height=32, width=32, max_sequence_length=5).images[0]'

# Two halves side by side, one on each core; the first says what it found when the second is through.
# In the first are files that start no script: the fork server of those that do is in one half alone.
HALF := $(patsubst %,tests/test_%.py,bf16 models peers reference rehearsal)
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

test: $(VENV)/.installed
	@$(VENV)/bin/ruff check && $(VENV)/bin/ruff format --check
	@log=$$(mktemp); $(PYTEST) $(HALF) > $$log 2>&1 & half=$$!; \
	$(PYTEST) $(HALF:%=--ignore=%); others=$$?; \
	wait $$half; code=$$?; cat $$log; rm $$log; exit $$((code | others))

mutants: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/mutants.py

# On a GPU that is not there, all models at their full depth, which needs a C++ compiler; then the
# script of a first hour on a GPU, with small models on the CPU. Two hours of a shared core in all.
# What was seen, run by run: out/rehearsal.json.
rehearse: $(VENV)/.installed
	REHEARSAL=full $(PYTEST) tests/test_rehearsal.py tests/test_first_hour.py

# SDXL at its full depth in float32 on the CPU, two iterations and the export: half an hour, 20 GB of
# main memory at most, 12 GB of disk.
rehearse-sdxl: $(VENV)/.installed
	$(VENV)/bin/python tests/full_depth.py out/sdxl-$(NOW)

toy: $(VENV)/.installed
	$(VENV)/bin/python toy/run.py --iterations 500 --out $(TOY)
	$(VENV)/bin/python toy/run.py --iterations 300 --separation 5,15,26.7 --methods dmd,adm-paper,adp+adm-paper --out $(TOY)/phase
	$(VENV)/bin/python toy/plot.py $(TOY)/results.json $(TOY)/phase/results.json --out $(TOY)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@
