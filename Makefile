PYTHON ?= python3
# The torch build to install into .venv: pip's default for this machine. On a cluster: make TORCH="torch==2.7.1+cu128 --index-url ..." install
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install
install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[run,dev]'
	touch $@
