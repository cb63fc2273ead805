# Every target sets up what it needs: a virtual environment in .venv with the project and its tools.
PYTHON ?= python3
# The torch build for .venv. With CUDA: make install TORCH="torch --index-url https://download.pytorch.org/whl/cu128"
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
REF ?= main
# Of a module that is in the test split of specs/tiny.yaml.
QUESTION ?= What does the method \`Queue.empty()\` of the module \`queue\` do?

.PHONY: demo test test-full check types golden published bench bench-runtime replay install clean

demo: install  ## compile specs/tiny.yaml, execute the bundle (text to an aligned model), and ask that model
	$(BIN)/trainwright compile specs/tiny.yaml -o build/demo
	$(BIN)/trainwright run build/demo
	$(BIN)/trainwright chat build/demo --temperature 0 --message "$(QUESTION)"

test: install  ## what a contributor runs: at most 15 minutes
	$(BIN)/pytest -m "not full"

test-full: install  ## what `test` leaves out: kills, mutations, long worlds; at most 60 minutes
	$(BIN)/pytest -m full

check: install types  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p trainwright.compiler -p trainwright.runtime
	PYTHONPATH=build/types $(BIN)/lint-imports

types:  ## the package tree that mypy and import-linter can follow (they cannot follow the editable install's import hook)
	mkdir -p build/types/trainwright
	for folder in compiler runtime specs templates; do ln -sfn ../../../$$folder build/types/trainwright/$$folder; done

golden: install  ## rewrite tests/golden; a person reads the diff
	$(BIN)/pytest -q tests/test_golden.py tests/test_readme.py tests/test_diff.py --rewrite-golden

published: install  ## claim, source, published, computed, error
	$(BIN)/python benchmarks/published.py

bench: install  ## speed against a peer or a limit
	$(BIN)/python benchmarks/search_speed.py
	$(BIN)/python benchmarks/fit_speed.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/shadow.py

bench-runtime: install  ## what emitted programs cost: start-up, overhead beside bare loops, loader, MFU where CUDA is; half an hour
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/cuda.py
	$(BIN)/python benchmarks/overhead.py

replay: install  ## compile every spec at REF and here and compare the bundles: a refactor shows nothing
	$(BIN)/python benchmarks/replay.py $(REF)

install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e '.[run,data,eval,dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info
