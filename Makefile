# `make demo` and `make test` work on a fresh clone: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs notebooks clean

demo: .venv/installed
	$(BIN)/python -m vit_jax.demo

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/installed-test
	$(BIN)/ruff check .

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

notebooks: .venv/installed-docs
	$(BIN)/python docs/notebooks/run.py

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {v}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# timm without its dependencies: it would bring torchvision, which the tests do without. jax2onnx asks for an older
# orbax-checkpoint than training needs.
.venv/installed-test: .venv/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31 jax2onnx==0.17.1
	touch $@

.venv/installed-docs: .venv/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf .venv runs site
