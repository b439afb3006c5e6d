# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
NOW := $(shell date +%Y%m%d-%H%M%S)
DEMO := out/demo-$(NOW)
TOY := out/toy-$(NOW)

.PHONY: demo test toy

demo: $(VENV)/.installed
	$(VENV)/bin/python adm.py --out $(DEMO)
	@echo "Samples: $(DEMO)/samples   losses: $(DEMO)/log.csv   the student: $(DEMO)/pipeline (its README.md says how to call it)"

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

toy: $(VENV)/.installed
	$(VENV)/bin/python toy/run.py --iterations 500 --out $(TOY)
	$(VENV)/bin/python toy/run.py --iterations 300 --separation 5,15,26.7 --methods dmd,adm,adp+adm --out $(TOY)/phase
	$(VENV)/bin/python toy/plot.py $(TOY)/results.json $(TOY)/phase/results.json --out $(TOY)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@
