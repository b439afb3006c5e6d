# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
DEMO := out/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test

demo: $(VENV)/.installed
	$(VENV)/bin/python adm.py --out $(DEMO)
	@echo "Samples: $(DEMO)/samples   losses: $(DEMO)/log.csv   the student: $(DEMO)/pipeline (its README.md says how to call it)"

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@
