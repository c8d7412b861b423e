# `make help` lists the targets. Flags of a job: make lora ARGS="--load_model base.pth --data_file mine.jsonl"
# STACK=modern uses .venv-modern, the stack for newer GPUs. PY=/path/to/python uses an existing Python and installs nothing.
SHELL := bash
STACK ?= cu117
VENV ?= $(if $(filter cu117,$(STACK)),.venv,.venv-$(STACK))
LOCKS := $(wildcard env/locks/$(STACK).txt env/locks/$(STACK)-deepspeed.txt)
KERNELS := rwkv/kernels/lib/.$(STACK)
space := $() $()
ifdef PY
override PY := $(subst $(space),\$(space),$(subst \$(space),$(space),$(PY)))# blanks, escaped once also in a sub-make
.PHONY: $(KERNELS)
MAKE_COMMAND := make PY=$(PY)
else
MAKE_COMMAND := make$(if $(filter cu117,$(STACK)),, STACK=$(STACK))$(if $(filter command environment,$(firstword $(origin VENV))), VENV=$(VENV))
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
ORACLE := $(VENV)/oracle/.ready
ORACLE_LOCKS := tests/oracle.txt $(wildcard tests/oracle-$(STACK).txt)
endif
# Run the code of this checkout. Jobs also get the make command that started them, so that they print commands in the same form (rwkv/commands.py).
HERE := '$(subst ','\'',$(CURDIR))'
CODE = PYTHONPATH=$(HERE)$${PYTHONPATH:+:$$PYTHONPATH}
JOB = $(CODE) RWKV_MAKE='$(MAKE_COMMAND)' $(if $(findstring w,$(firstword -$(MAKEFLAGS))),RWKV_MAKE_FOLDER=$(HERE)) PY=$(PY)
# Reject misspelt variables: ARG="--load_model ..." would be ignored and the demo would run.
VARIABLES := $(if $(filter model,$(MAKECMDGOALS))$(filter-out 0,$(MAKELEVEL)),MODEL) ARGS RESULTS PY STACK VENV TOOLS CLEAN_DEMO OUT PYTHON PYENV_ROOT CONDA BASE_IMAGE BUILT ENGINE ENGINE_OPTIONS NO_CACHE UPGRADE DOCKER_WORK LOG \
  SHELL MAKEFLAGS MAKEOVERRIDES MAKEFILES CURDIR COMPOSE_% CUDA_% NCCL_% GLOO_% OMP_% MKL_% RWKV_% WANDB_% HF_% TORCH_% PYTORCH_% PIP_% UV_% %_PROXY %_proxy
UNKNOWN := $(filter-out $(VARIABLES),$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v)))
ifneq ($(UNKNOWN),)
$(error $(firstword $(UNKNOWN)) is not a variable of this Makefile; pass flags of a job as ARGS="--name value ...", and environment variables before make: NAME=value make ...)
endif
TOOLS := .venv-tools
CLEAN_DEMO := out/demo
.DEFAULT_GOAL := help
.PHONY: help venv env tools image test-image reproduce compose-env kernels lora state dpo finetune pretrain convert inspect merge generate serve evaluate export doctor estimate model demo lm-eval ray test test-gpu gpu-report bench lint lock pin licenses sbom clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY)  ## create .venv with the cu117 stack from the hash-locked files; STACK=modern creates .venv-modern
	@$(MAKE) --silent $(KERNELS) || echo 'Continuing without the compiled kernels: results are correct, but slow.'

$(VENV)/.ready: $(LOCKS) env/venv.sh env/install.sh env/uv.sh env/locks/uv.txt
	env/venv.sh $(VENV) $(STACK)
	@touch $@

env:  ## create the conda environment `rwkv` with the same packages (mamba, micromamba or conda)
	env/conda.sh

tools: $(TOOLS)/.ready  ## create .venv-tools: mypy, hadolint and other checkers

$(TOOLS)/.ready: env/locks/tools.txt env/tools.sh $(READY)
	env/tools.sh $(TOOLS) $(PY)
	@touch $@

image:  ## build the container image of the stack; BASE_IMAGE=... selects another base
	docker/engine.sh docker/image.sh $(STACK)

# Exit status 75 of engine.sh means that there is no Docker engine: skip the tests instead of failing.
test-image: venv $(TOOLS)/.ready  ## build the image and test it, inside and outside (ARGS goes to pytest)
	@docker/engine.sh docker/test_image.sh $(STACK) $(PY) $(HERE)/$(TOOLS)/bin/docker-compose $(ARGS) || \
	  { status=$$?; [ $$status = 75 ] && echo 'test-image: skipped, see above'; }

reproduce:  ## build the image twice, the second time without a cache, and compare packages and kernels
	docker/engine.sh docker/reproduce.sh $(STACK)

compose-env:  ## write .env for docker compose: user, stack, and whether there is a GPU
	docker/compose_env.sh $(STACK)

kernels: $(READY)  ## compile the kernels for this machine (ALL=1: for every GPU of the stack), unless they are current
	@$(if $(ALL),RWKV_KERNELS_ALL=1) $(JOB) $(PY) -c 'from rwkv.kernels import build; build.main()'
	$(if $(READY),@touch $(KERNELS))

$(KERNELS): $(READY) $(wildcard cuda/*/*.h cuda/*/*.cpp cuda/*/*.cu) rwkv/kernels/build.py rwkv/kernels/nvrtc.py rwkv/compat.py
	@$(MAKE) --silent kernels

lora: venv  ## LoRA fine-tuning; without ARGS (or ARGS="--version 4") the full pipeline on a toy dataset
ifeq ($(filter-out --version 4 7,$(ARGS)),)
	@$(JOB) scripts/demo.sh $(ARGS)
else
	@$(JOB) $(PY) scripts/lora.py $(ARGS)
endif

state dpo finetune pretrain convert generate serve evaluate export doctor estimate: venv
	@$(JOB) $(PY) scripts/$@.py $(ARGS)
state:  ## state tuning: train only the state with which a model begins
dpo:  ## preference tuning on chosen and rejected answers (LoRA)
finetune:  ## full fine-tuning
pretrain:  ## train a new model
convert:  ## text and chats to binidx
generate:  ## run a model: --ask, --prompt, a file of prompts, or a chat
serve:  ## serve models over an OpenAI-compatible API, with a chat page
evaluate:  ## perplexity, bits per byte and benchmark tasks of models and adapters, in one table
export:  ## export a model, or a base + adapter: GGUF, transformers, safetensors, ...; import folders
estimate:  ## estimate the memory of a run; find settings that fit a GPU
doctor:  ## check this machine: what works, what is missing, how to fix it

model: venv  ## fetch a published model into models/ (MODEL=rwkv7-g1-0.4b); without MODEL list them
	@$(JOB) $(PY) scripts/fetch.py $(if $(MODEL),--model '$(MODEL)') $(ARGS)

inspect: venv  ## inspect a binidx dataset before training on it
	@$(JOB) $(PY) scripts/inspect_data.py $(ARGS)

merge: venv  ## merge an adapter into its base
	@$(JOB) $(PY) scripts/merge_lora.py $(ARGS)

demo: venv  ## the full pipeline on a toy dataset (the same as make lora without ARGS)
	@$(JOB) scripts/demo.sh $(ARGS)

lm-eval: venv  ## install lm-evaluation-harness beside the environment, for make evaluate ARGS="--tasks ..."
ifdef READY
	@$(MAKE) --silent $(VENV)/lm_eval/.ready
else
	@echo 'PY selects your own Python; install it there: $(PY) -m pip install lm-eval' >&2; exit 1
endif

ray: venv  ## install Ray beside the environment, for make convert ARGS="--ray ..."; ARGS="start --head" runs Ray
ifdef READY
	@$(MAKE) --silent $(VENV)/ray/.ready
	$(if $(ARGS),@PYTHONPATH="$$(realpath $(VENV)/ray)" RAY_USAGE_STATS_ENABLED=$${RAY_USAGE_STATS_ENABLED:-0} $(PY) -m ray.scripts.scripts $(ARGS))
else
	@echo 'PY selects your own Python; install it there: $(PY) -m pip install ray, which has the command ray' >&2; exit 1
endif

$(VENV)/lm_eval/.ready: env/locks/lm-eval-$(STACK).txt
$(VENV)/ray/.ready: env/locks/ray-$(STACK).txt
$(VENV)/lm_eval/.ready $(VENV)/ray/.ready: $(VENV)/.ready
	rm -rf $(@D)
	env/uv.sh $(PY) pip install --python $(PY) --quiet --require-hashes --no-deps --no-build-isolation --target $(@D) -r $(filter env/locks/%,$^)
	@touch $@

# An independent implementation to compare with in tests; not installed into the environment.
$(VENV)/oracle/.ready: $(VENV)/.ready $(ORACLE_LOCKS)
	rm -rf $(@D)
	$(PY) -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps --target $(@D) $(ORACLE_LOCKS:%=-r %)
	@touch $@

test: venv $(ORACLE)  ## run the tests in two processes (ARGS is passed to pytest; ARGS="-n 8": in eight)
	$(CODE) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

# Use the stack for this GPU (make test-gpu STACK=modern), or PY= with an existing Python.
test-gpu: venv  ## tests and benchmarks that need an NVIDIA GPU
	$(CODE) $(PY) -m pytest tests/gpu -m gpu $(ARGS)
	$(CODE) $(PY) bench/gpu/wkv4.py

gpu-report: venv  ## check and measure on one GPU in at most 9 minutes (RESULTS=1: into docs/results.md)
	$(CODE) $(PY) bench/gpu/report.py $(if $(RESULTS),--results) $(ARGS)

bench: venv  ## benchmark a training step against transformers + peft and against its matmuls alone
	@$(CODE) $(PY) bench/step.py $(ARGS)

lint: $(VENV)/.ready $(TOOLS)/.ready  ## ruff, import contracts, mypy, shellcheck, hadolint, compose files, workflows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	env/lint.sh $(VENV) $(TOOLS)

lock: $(VENV)/.ready  ## lock pyproject.toml into env/locks/ (UPGRADE=1: newest indirect dependencies)
	env/lock.sh $(VENV)/bin/uv

pin:  ## pin actions to commits and the base image to its digest
	env/pin.sh

licenses: venv $(TOOLS)/.ready  ## write the licences of all packages to build/licenses-STACK.md
	@mkdir -p build
	$(TOOLS)/bin/pip-licenses --python=$(PY) --from=mixed --with-system --with-urls --order=license --format=markdown --output-file=build/licenses-$(STACK).md

sbom: venv $(TOOLS)/.ready  ## write a CycloneDX SBOM to build/sbom-STACK.cdx.json
	@mkdir -p build
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file build/sbom-$(STACK).cdx.json $(PY)

clean:  ## remove environments and build outputs; keeps your data and runs
	rm -rf $(VENV) .venv .venv-modern .venv-uv $(TOOLS) $(CLEAN_DEMO) rwkv/kernels/lib build ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
