# SSR-Merge. `make demo` and `make test` need python3, git and make; they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo demo-images test lint test-host compatibility bench-padding bench-batching bench-conversion bench-quantised bench-speed bench-quality bench-records bench-smoke clean help bench-compression bench-ranks lint-web test-web

help:
	@echo "make demo                            merge three small LoRAs, results in demo_output/"
	@echo "make test                            everything that needs no ComfyUI"
	@echo "make lint                            ruff and a strict type check"
	@echo "make lint-web, make test-web         the browser's modules, where node is installed (npm install once for the linter)"
	@echo "make test-web COMFYUI_PATH=<path>    the real frontend in Chromium too (HOST_PYTHON=its python with playwright; SHOTS=<folder>)"
	@echo "make test-host COMFYUI_PATH=<path>   the real ComfyUI: loaders, server, KSampler (HOST_PYTHON=its python, ARGS='-k name')"
	@echo "make compatibility COMFYUI_PATH=<path>  run every cell of docs/compatibility.md and write it anew"
	@echo "make bench-padding, bench-batching, bench-conversion   measurements behind defaults (docs/benchmarks/)"
	@echo "make bench-compression               truncation by outputs beside the plain SVD (docs/benchmarks/compression.md)"
	@echo "make bench-ranks                     calibration shared by processes: time and difference (docs/benchmarks/ranks.md)"
	@echo "make bench-quantised COMFYUI_PATH=<path>   how much of a merge acts on quantised models, and its cost"
	@echo "make bench-speed                     speed and memory (ARGS='--device cuda', '--threads 0'); docs/benchmarks/speed.md"
	@echo "make bench-quality                   trains a small world and compares methods in it (tables to docs/benchmarks/quality.md)"
	@echo "make bench-records                   what merges from calibration records lose, and what a record costs"
	@echo "make bench-smoke                     the benchmarks at toy size: only shows that they run"
	@echo "make clean                           remove the virtual environment and all outputs"

$(STAMP): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m demo

# The pictures of the README.
demo-images: demo
	cp demo_output/report_light.png docs/images/demo_report.png
	cp demo_output/compare.png docs/images/demo_compare.png

test: $(STAMP)
	$(PY) -m pytest tests/unit

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Without node, a browser or a ComfyUI checkout each part says that it was skipped.
lint-web:
	@if ! command -v node > /dev/null; then echo "SKIPPED lint-web: node is not installed"; \
	elif [ ! -d node_modules/eslint ]; then echo "SKIPPED lint-web: run npm install --no-package-lock first"; \
	else node_modules/.bin/eslint web tests/web; fi

SHOTS ?=
test-web: $(if $(COMFYUI_PATH),,$(STAMP))
	@if command -v node > /dev/null; then node --test tests/web/modules/; \
	else echo "SKIPPED tests/web/modules: node is not installed"; fi
	COMFYUI_PATH=$(COMFYUI_PATH) SSR_SHOTS=$(SHOTS) $(if $(COMFYUI_PATH),$(HOST_PYTHON),$(PY)) -m pytest tests/web -rs \
	    -p no:cacheprovider $(ARGS)

# Runs in ComfyUI's own Python with pytest (and playwright and Debian's chromium, for the example workflows):
# set HOST_PYTHON where it is not the one on the path; ARGS="-k name" selects tests.
HOST_PYTHON ?= $(PYTHON)
test-host:
	COMFYUI_PATH=$(COMFYUI_PATH) $(HOST_PYTHON) -m pytest tests/host -rs -p no:cacheprovider $(ARGS)

compatibility:
	SSR_WRITE_COMPATIBILITY=1 COMFYUI_PATH=$(COMFYUI_PATH) $(HOST_PYTHON) -m pytest tests/host/test_compatibility.py -rs \
	    -p no:cacheprovider $(ARGS)

bench-padding: $(STAMP)
	$(PY) -m benchmarks.padding

bench-batching: $(STAMP)
	$(PY) -m benchmarks.batching

bench-conversion: $(STAMP)
	$(PY) -m benchmarks.conversion

bench-compression: $(STAMP)
	$(PY) -m benchmarks.compression

bench-ranks: $(STAMP)
	$(PY) -m benchmarks.ranks $(ARGS)

bench-quantised:
	COMFYUI_PATH=$(COMFYUI_PATH) $(HOST_PYTHON) -m benchmarks.quantised $(ARGS)

bench-speed: $(STAMP)
	$(PY) -m benchmarks.speed $(ARGS)

bench-quality: $(STAMP)
	$(PY) -m benchmarks.quality $(ARGS)

bench-records: $(STAMP)
	$(PY) -m benchmarks.records $(ARGS)

bench-smoke: $(STAMP)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(PY) -m benchmarks.speed --toy --out "$$out" > /dev/null && \
	    $(PY) -m benchmarks.quality --toy --processes 1 --out "$$out" > /dev/null && \
	    $(PY) -m benchmarks.records --toy --out "$$out" --cache "$$out" > /dev/null && echo "All three benchmarks ran."

clean:
	rm -rf $(VENV) demo_output host_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
