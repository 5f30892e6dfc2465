# make demo: the whole way on handwritten digits.  make test: the tests.  Both set up .venv where needed.  make bench: what we claim of speed.
# make test-processors: the tests of numerics, as lesser processors than this one compute.
# make faults: launches, signals, kills, hangs and injected faults, each on several processes; an hour or more.
# make mutations: plants known errors one at a time, each of which must fail its tests; an hour. `make mutations ONLY=weighting` plants some.
# make test-oldest: some tests with the lowest versions that pyproject.toml allows, in a virtual environment of their own.
PYTHON ?= python3
RUN ?= runs/digits
# A shorter demo, say `make demo STEPS=150 GOALS=`: fewer steps, and no figures to reach.
STEPS ?= 2000
GOALS ?= --min_accuracy 0.97 --min_diversity 0.7 --min_nearest 0.7
SAMPLE = --pipeline $(RUN)/export --class_labels 0 1 2 3 4 5 6 7 8 9 --num_images 10 --num_inference_steps 25 --guidance_scale 2 --seed 0

# What depends on a processor's kernels, and lesser processors than this one: oneDNN's, ATen's and MKL's code for them, and other threads.
NUMERIC = kernels plan half precision dit models modeling text_networks convert_dit solver sde schedulers scheduler_pipelines path \
	parameterisation objective methods guidance inverse likelihood time random coupling conditions frechet evaluate initialise lora text \
	utilisation langevin old_folders
LESSER = DNNL_MAX_CPU_ISA=SSE41,ATEN_CPU_CAPABILITY=default,MKL_CBWR=COMPATIBLE,OMP_NUM_THREADS=1 \
	DNNL_MAX_CPU_ISA=AVX2,ATEN_CPU_CAPABILITY=avx2,MKL_CBWR=AVX2,OMP_NUM_THREADS=2

BIN = .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# What touches each dependency: networks and exports, text, tables, tars, remote shards, images, checkpoints, averages, trackers, options.
OLDEST_TESTS = dit modeling schedulers scheduler_pipelines export_text text_networks coupling frechet prepare tar remote decode bands \
	checkpoint averages tracking options_places recipe lora card inspect learning

.PHONY: demo test test-processors test-oldest faults mutations lint bench wheel clean
.DELETE_ON_ERROR:

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"condot needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.ready
	python -m data.prepare digits --output $(RUN)/shards
	accelerate launch --quiet train.py --config configs/digits.yaml --output_dir $(RUN) --data.shards $(RUN)/shards --train.max_steps $(STEPS)
	python sample.py export --run $(RUN) --output $(RUN)/export
	python sample.py $(SAMPLE) --solver heun --output $(RUN)/ode.png
	python sample.py $(SAMPLE) --solver dpmpp_2m_sde --output $(RUN)/sde.png
	python sample.py evaluate --pipeline $(RUN)/export --reference $(RUN)/shards $(GOALS)

test: .venv/.ready
	OMP_NUM_THREADS=1 python -m pytest -m 'not gpu and not faults' -n 2 --dist loadfile

test-processors: .venv/.ready
	for lesser in $(LESSER); do \
		echo "== $$(echo $$lesser | tr , ' '): $(words $(NUMERIC)) files"; \
		env $$(echo $$lesser | tr , ' ') python -m pytest -m 'not gpu and not faults' -n 2 --dist loadfile $(NUMERIC:%=tests/test_%.py) || exit 1; \
	done

build/oldest/.ready: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv build/oldest
	$(PYTHON) tests/oldest.py > build/oldest/requirements.txt
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check -r build/oldest/requirements.txt
	touch $@

test-oldest: build/oldest/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) build/oldest/bin/python -m pytest -m 'not gpu and not faults' $(OLDEST_TESTS:%=tests/test_%.py)

mutations: .venv/.ready
	OMP_NUM_THREADS=1 python tests/mutations.py $(ONLY:%=--only %)

faults: .venv/.ready
	OMP_NUM_THREADS=1 python -m pytest -m faults --durations 10

lint: .venv/.ready
	ruff check . && ruff format --check . && mypy

bench: .venv/.ready
	python benchmarks/solver_overhead.py
	python benchmarks/loader.py
	python benchmarks/loader.py --scale
	python benchmarks/train_step.py
	python benchmarks/memory.py
	python benchmarks/schedulers.py
	python benchmarks/sampling.py
	python benchmarks/loop.py
	python benchmarks/checkpoint.py
	python benchmarks/scaling.py
	python benchmarks/cluster.py

wheel: .venv/.ready
	python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
