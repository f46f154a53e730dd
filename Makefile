# The only task runner: `make help` lists the targets. Every target makes the environment it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
TORCH_NPU ?=
VENV_NPU ?= .venv-npu$(addprefix -,$(TORCH_NPU))
VENV_UI ?= .venv-ui
VENV_RAY ?= .venv-ray
PY := $(VENV)/bin/python
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python3.13; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$p" && break; done)
TORCH_INDEX ?=
SOC ?= Ascend910B3
CHECKPOINTS ?= checkpoints
SEED ?= 4
DEMO := examples/demo/checkpoint
DEMO_OUT := out/demo

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## create .venv and install everything (TORCH_INDEX=URL: where to take torch from)

$(VENV)/.installed: setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.10-3.13 found; install one, or name it: make setup PYTHON=/path/to/python3.11"; exit 3; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (a few minutes the first time)"
	@$(if $(TORCH_INDEX),$(PY) -m pip install --quiet --index-url "$(TORCH_INDEX)" "torch>=2.13$(comma)<2.14")
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup  ## the main job on a small trained model: convert, ask two questions, prove it (SEED=n: another picture)
	@$(PY) -m convert --model $(DEMO) --out $(DEMO_OUT)/vision
	@$(PY) examples/demo/ask.py --model $(DEMO) --artifact $(DEMO_OUT)/vision --seed $(SEED) --out $(DEMO_OUT)
	@$(PY) -m runtime.compare --model $(DEMO) --artifact $(DEMO_OUT)/vision --out $(DEMO_OUT)/report

test: setup  ## all tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests

test-versions: setup  ## the suite on Python 3.10-3.13 (3.13: without quant), tests on lowest and highest releases; ARGS="--only 3.10 onnx"
	@$(PY) tests/helpers/versions.py $(ARGS)

test-npu: $(VENV_NPU)/.installed  ## the NPU path under the real torch_npu wheel on stand-in CANN libraries (needs gcc); TORCH_NPU=2.9.0: that release
	@$(VENV_NPU)/bin/python tests/npu/run.py

# --no-deps: on x86 torch_npu 2.7 to 2.9 want torch 2.9.0+cpu by that name, which PyPI does not have
$(VENV_NPU)/.installed: RELEASE := $(or $(TORCH_NPU),2.13.0)
$(VENV_NPU)/.installed: TORCH := torch==$(firstword $(subst .post, ,$(RELEASE))).*
$(VENV_NPU)/.installed: setup.py
	@command -v g++ >/dev/null || { echo "make test-npu builds stand-in libraries with gcc and g++; run: apt-get install g++"; exit 3; }
	@test -x $(VENV_NPU)/bin/python || $(PYTHON) -m venv $(VENV_NPU)
	@echo "installing packages into $(VENV_NPU) (a few minutes the first time)"
	@$(if $(TORCH_INDEX),$(VENV_NPU)/bin/python -m pip install --quiet --index-url "$(TORCH_INDEX)" '$(TORCH)')
	@$(VENV_NPU)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check '$(TORCH)' -e . pytest pyyaml
	@$(VENV_NPU)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps torch_npu==$(RELEASE)
	@touch $@

test-ui: $(VENV_UI)/.installed  ## the page in headless Chromium (needs chromium); SHOTS=folder keeps screenshots
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "make test-ui needs a browser; run: apt-get install chromium"; exit 3; }
	@SHOTS="$(SHOTS)" $(VENV_UI)/bin/python -m pytest tests/runtime/test_ui.py

test-ray: $(VENV_RAY)/.installed  ## runtime.predict on Ray: 500 lines, two actors, one of them killed
	@$(VENV_RAY)/bin/python -m pytest tests/runtime/test_predict_ray.py

# what the main environment has is not installed a second time
$(VENV_UI)/.installed: PACKAGES := -e '.[ui]' 'playwright>=1.50,<2'
$(VENV_RAY)/.installed: PACKAGES := -e '.[ray]'
$(VENV_UI)/.installed $(VENV_RAY)/.installed: $(VENV)/.installed
	@test -x $(@D)/bin/python || $(PY) -m venv $(@D)
	@$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	@echo "installing packages into $(@D) (a minute the first time)"
	@$(@D)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(PACKAGES)
	@touch $@

lint: setup  ## ruff: rules and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .

convert: setup  ## MODEL=checkpoint OUT=folder [SOC=Ascend910B3]: export and verify the vision encoder, prepare ATC
	@test -n "$(MODEL)" -a -n "$(OUT)" || { echo "usage: make convert MODEL=/path/to/checkpoint OUT=/path/to/artifact [SOC=$(SOC)]"; exit 2; }
	@$(PY) -m convert --model "$(MODEL)" --out "$(OUT)" --soc-version "$(SOC)"

convert-visualglm: NAME := visualglm-6b
convert-glm4v: NAME := glm-4v-9b
convert-llava: NAME := llava-1.5-7b-hf
convert-glm-edge-v: NAME := glm-edge-v-2b
convert-visualglm convert-glm4v convert-llava convert-glm-edge-v: setup  ## make convert with MODEL=checkpoints/<name> OUT=out/<name>
	@$(PY) -m convert --model "$(or $(MODEL),$(CHECKPOINTS)/$(NAME))" --out "$(or $(OUT),out/$(NAME))" --soc-version "$(SOC)"

quant-w8a8: SCHEME := w8a8
quant-w8a8s: SCHEME := w8a8s
quant-w8a8 quant-w8a8s: setup  ## MODEL=checkpoint OUT=folder: quantise the language model (W8A8, or sparse W8A8S), prove it
	@test -n "$(MODEL)" -a -n "$(OUT)" || { echo "usage: make $@ MODEL=/path/to/checkpoint OUT=/path/to/quantised"; exit 2; }
	@$(PY) -m quant --model "$(MODEL)" --out "$(OUT)" --scheme $(SCHEME)

bench-quant: setup  ## time and memory of quantisation against msmodelslim's own run; W8A8 against bfloat16 on this CPU
	@$(PY) benchmarks/bench_quant.py

bench-peers: setup  ## MODEL=glm-edge-1.5b | llava-7b-vision | visualglm-vision | tiny | tiny-vision [ARGS="--rounds 5"]: other runtimes and us
	@test -n "$(MODEL)" || { echo "usage: make bench-peers MODEL=glm-edge-1.5b (or llava-7b-vision, visualglm-vision, tiny, tiny-vision)"; exit 2; }
	@$(PY) benchmarks/bench_peers.py --model "$(MODEL)" $(ARGS)

bench-export: setup  ## MODEL=checkpoint: time and peak memory of the vision export
	@test -n "$(MODEL)" || { echo "usage: make bench-export MODEL=/path/to/checkpoint"; exit 2; }
	@$(PY) benchmarks/bench_export.py --model "$(MODEL)"

hostile: setup  ## 20,000 hostile requests to a service of its own, on loopback: no crash, fetch, status 500 or leak
	@$(PY) benchmarks/hostile.py

storm: setup  ## an hour of clients that break off, with pictures of all sizes: memory stays flat (SECONDS_OF_STORM=n: another time)
	@$(PY) benchmarks/storm.py --seconds "$(or $(SECONDS_OF_STORM),3600)"

overload: setup  ## 10 minutes of requests at twice the rate that a service of its own can keep up with
	@$(PY) benchmarks/overload.py

NEIGHBOURS := $(DEMO_OUT)/glm-edge-1.5b-chat
bench-neighbours: setup  ## the demo and GLM-Edge-1.5B int8 (random weights, 3 GB) beside two busy loops: at least 0.4 of alone
	@test -f $(NEIGHBOURS)/config.json || $(PY) -m models.synthetic --like glm-edge-1.5b-chat --out $(NEIGHBOURS)
	@$(PY) benchmarks/neighbours.py $(DEMO) $(NEIGHBOURS):int8 $(ARGS)

bench-decode: setup  ## MODEL=checkpoint [WEIGHTS=int8] [BATCH=1,8]: where the time of a token goes on this CPU
	@test -n "$(MODEL)" || { echo "usage: make bench-decode MODEL=/path/to/checkpoint [WEIGHTS=float|int8|int4] [BATCH=1,8]"; exit 2; }
	@$(PY) benchmarks/bench_decode.py --model "$(MODEL)" --cpu-weights "$(or $(WEIGHTS),float)" --batch "$(or $(BATCH),1)"

chat: setup  ## MODEL=checkpoint: interactive chat
	@test -n "$(MODEL)" || { echo "usage: make chat MODEL=/path/to/checkpoint"; exit 2; }
	@$(PY) -m runtime.chat --model "$(MODEL)"

bench: setup  ## MODEL=checkpoint [OUT=folder]: the grid of batch sizes and lengths as tables
	@test -n "$(MODEL)" || { echo "usage: make bench MODEL=/path/to/checkpoint [OUT=/path/to/tables]"; exit 2; }
	@$(PY) -m runtime.bench --model "$(MODEL)" --batch-size 1,2,4,8 --out "$(or $(OUT),out/bench)"

compare: setup  ## MODEL=checkpoint OUT=folder: precision report against the reference
	@test -n "$(MODEL)" -a -n "$(OUT)" || { echo "usage: make compare MODEL=/path/to/checkpoint OUT=/path/to/report"; exit 2; }
	@$(PY) -m runtime.compare --model "$(MODEL)" --out "$(OUT)"

doctor: setup  ## is everything here for this machine's CPU or NPUs, and what to run if not
	@$(PY) -m runtime.doctor

clean:  ## remove what demo and tests wrote
	@rm -rf out .pytest_cache .ruff_cache

comma := ,
.PHONY: help setup demo test test-versions test-npu test-ui test-ray lint convert chat bench compare doctor clean hostile storm \
	overload \
	bench-decode bench-neighbours bench-export bench-peers bench-quant quant-w8a8 quant-w8a8s convert-visualglm convert-glm4v convert-llava \
	convert-glm-edge-v
