PYTHON ?= python3.11
BIN := .venv/bin
RUN := runs/demo-$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: help install demo test test-slow lint bench docs clean

help:
	@echo "make install    virtual environment in .venv with everything that demo and tests need"
	@echo "make demo       train on photographs, sample, compare, and write report.html (10 minutes on 2 cores)"
	@echo "make test       fast tests (5 minutes on 2 cores); make test-slow: the others"
	@echo "make lint       ruff and mypy"
	@echo "make bench      time ratios of sampling and training"
	@echo "make docs       the documents and the API as a site, in build/site"

# The stamp makes a second call a no-op until the dependencies change.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[dev]"
	touch .venv/.installed

install: .venv/.installed

demo: install
	@echo "step 1 of 2: train a sampler for deblurring on the photographs of the package (about 5 minutes on 2 cores)"
	$(BIN)/python train.py experiment=demo run_dir=$(RUN)
	@echo "step 2 of 2: sample test photographs, and compare with A^dagger y, the start and LATINO (about 4 minutes)"
	$(BIN)/python sample.py --config-name demo model=$(RUN)/export output=$(RUN)/samples
	@echo "done: open $(RUN)/samples/report.html to see the samples, and where they differ; the model is $(RUN)/export"

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install
	$(BIN)/python -m pytest -n 2 -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/cost.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
