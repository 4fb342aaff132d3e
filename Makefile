# Each target makes the environment it needs; `make PYTHON=/path/to/python3.13 venv` chooses the Python.
# ARGS goes to the command: make test ARGS="-k ops", make quickstart ARGS="--dir /tmp/quickstart".
PYTHON_IN_VENV := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv quickstart lint types test test-clients test-all bench image clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

venv: ## make or update .venv (does nothing when it is up to date)
	@tools/bootstrap.sh

quickstart: venv ## pretrain a small model on this machine, and show what came of it
	.venv/bin/megatron-xielu quickstart $(ARGS)

lint: venv ## ruff: rules and format
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .

types: venv ## mypy over the package
	$(PYTHON_IN_VENV) -m mypy

# by files, because tests of one file share the ranks that they start
test: lint types ## lint, types and the tests, without the slow ones and other people's programs
	$(PYTHON_IN_VENV) -m pytest -m "not slow and not clients" -n 2 --dist loadfile $(ARGS)

test-clients: venv ## an export in transformers, llama.cpp, mlx-lm and lm-eval (fetched once)
	$(PYTHON_IN_VENV) -m pytest -m clients $(ARGS)

test-all: lint types ## lint, types and every test this machine can run
	$(PYTHON_IN_VENV) -m pytest $(ARGS)

bench: venv ## time training on this machine's CPU against stock transformers
	$(PYTHON_IN_VENV) tools/bench_training.py $(ARGS)

image: ## build the Docker image megatron-xielu; ARGS="--build-arg BASE_IMAGE=..." changes its base
	docker build --build-arg REVISION=$$(git rev-parse HEAD) -t megatron-xielu $(ARGS) .

clean: ## delete caches and build outputs (.venv stays)
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find megatron_xielu tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
