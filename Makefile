PYTHON ?= python3.11
BIN := .venv/bin
RUN := runs/demo-$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: help install demo test test-slow lint bench docs clean

help:
	@echo "make install    virtual environment in .venv with everything that demo and tests need"
	@echo "make demo       restore photographs, train a model, compare, and write two reports (10 minutes on 2 cores)"
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
	@echo "step 1 of 3: the shipped models on photographs of 256x256 that they never saw, beside LATINO (about 1 minute on 2 cores)"
	$(BIN)/ud2m evaluate name=shipped results=$(RUN) prior=photographs_prior num_samples=4 tune=false unsupported=skip \
		metrics='[psnr,psnr_limit,lpips,r]' datasets='["photos tile_size=256 test_limit=2"]' \
		methods='["latino target.setting.tau_first=0.4 target.setting.width=1.4 label=LATINO","ud2m target.model=photographs_{physics} label=UD2M"]'
	@echo "step 2 of 3: train a model of your own for deblurring, on the photographs of the package (about 5 minutes)"
	$(BIN)/python train.py experiment=demo run_dir=$(RUN)/training
	@echo "step 3 of 3: sample test photographs with it, and compare with A^dagger y, the start and LATINO (about 3 minutes)"
	$(BIN)/python sample.py --config-name demo model=$(RUN)/training/export output=$(RUN)/samples
	@echo "done. What the shipped models make of blur, low resolution and missing pixels: $(RUN)/shipped/report.html"
	@echo "What your own model makes of blur, and where its samples differ: $(RUN)/samples/report.html; the model is $(RUN)/training/export"

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
