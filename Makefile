# make demo: verify recordings with the model in the package; train two adapters for it on synthetic voices; push all to a
#            Hub on this machine, pull, swap, evaluate; a page of results in runs/demo-report.
# make test: lint, types, and the tests that are not slow: six and a half minutes on two cores.
# make test-all: lint, types and all tests, with more examples of each property: what has to pass before a change lands.
# make test-newest, make test-oldest: all tests with the newest and the oldest packages that pyproject.toml allows, in
#            .venv-newest and .venv-oldest.
# make test-gpu: the tests that need a GPU; without one each says that it was skipped.
# make test-foreign: the test suites of transformers and PEFT on this project's models, the documents' lines with only what
#            each needs installed, and docs/results/foreign.md from what they gave. It downloads transformers' tests and the
#            packages of a dozen environments, and needs node and npm; PEFT_CHECKOUT names a checkout of PEFT's
#            repository, without which PEFT's tests are left out. FOREIGN='--only doors' runs a part again.
# make docs: writes the pages that are made from the code, and builds the website in build/site; a warning is an error.
# make wheel: the wheel and the source archive in dist, and a check: installed in an empty environment, without network but
#            for its packages, the wheel verifies the recordings in it.
# make browser: the packages of examples/browser, from npm; with them, and Chromium, its tests run instead of being skipped.
# make lock: writes requirements.lock anew, the exact packages that .venv is made of.
# demo, test, test-all, test-gpu, test-foreign and docs set up .venv when it is missing or older than requirements.lock or
# pyproject.toml. PYTHON=python3.13 chooses another Python (3.11 to 3.13). UV=uv takes your own uv instead of the one
# that is put into .tools.
PYTHON ?= python3
UV ?= .tools/bin/uv
UV_VERSION := 0.13.9
BIN := .venv/bin
TRAIN = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $$(nproc) train_hf.py
SHORT := --placement projection --rank 4 --steps 16 --evaluate_every 16 --tests '{}'

.PHONY: demo test test-all test-gpu test-foreign test-newest test-oldest docs wheel browser lock

demo: .venv/ready
	rm -rf runs/demo-telephony runs/demo-noisy
	$(BIN)/python examples/first_steps.py
	$(TRAIN) adapters/telephony.yaml --model nano $(SHORT) --output runs/demo-telephony
	$(TRAIN) adapters/noisy.yaml --model nano $(SHORT) --output runs/demo-noisy
	$(BIN)/python examples/adapters_over_the_hub.py nano telephony=runs/demo-telephony/best \
		noisy=runs/demo-noisy/best --local --owner demo --trials data/synthetic/test/trials.txt \
		--folder data/synthetic/test/wav --noise data/synthetic/train
	$(BIN)/mrl-redimnet evaluate nano --trials data/synthetic/test/trials.txt \
		--folder data/synthetic/test/wav --page runs/demo-report

PYTEST := python -m pytest -n auto --dist worksteal

test: CHOICE := -m "not slow"
test-all: CHOICE := --hypothesis-profile=ci
test-gpu: .venv/ready
	$(BIN)/python -m pytest tests/gpu -rs

test-foreign: .venv/ready .tools/bin/uv  # the pip beside that uv downloads
	OMP_NUM_THREADS=1 $(BIN)/python tests/foreign/run.py --pip .tools/bin/pip --uv $(UV) $(FOREIGN)

test test-all: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/$(PYTEST) $(CHOICE)

docs: .venv/ready
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

RECORDINGS := import mrl_redimnet.recordings as r; print

wheel: .tools/bin/uv
	rm -rf dist build/wheel-check
	$(UV) build --quiet --python $(PYTHON)
	$(UV) venv --quiet --python $(PYTHON) build/wheel-check
	$(UV) pip install --quiet --python build/wheel-check dist/*.whl
	cd build/wheel-check && HF_HUB_OFFLINE=1 bin/mrl-redimnet verify nano \
		$$(bin/python -I -c "$(RECORDINGS)(r.FIRST)") --test $$(bin/python -I -c "$(RECORDINGS)(r.SAME_SPEAKER)")
	cd build/wheel-check && ! HF_HUB_OFFLINE=1 bin/mrl-redimnet verify nano \
		$$(bin/python -I -c "$(RECORDINGS)(r.FIRST)") --test $$(bin/python -I -c "$(RECORDINGS)(r.OTHER_SPEAKER)")
	@ls -l dist

browser:  # no install scripts: onnxruntime-node's would fetch CUDA libraries
	npm ci --prefix examples/browser --ignore-scripts --no-audit --no-fund

.venv/ready: requirements.lock pyproject.toml $(filter .tools/bin/uv,$(UV))
	@echo "Setting up .venv: about 3 GB to download, 6.5 GB on disk, most of it torch with its CUDA libraries."
	$(UV) venv --quiet --clear --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python .venv requirements.lock
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	@touch $@

test-newest test-oldest: test-%: .tools/bin/uv
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-$*
	$(UV) pip install --quiet --python .venv-$* --resolution $(RESOLUTION_$*) --editable '.[dev]'
	.venv-$*/bin/$(PYTEST)

RESOLUTION_newest := highest
RESOLUTION_oldest := lowest-direct

lock: .tools/bin/uv
	$(UV) pip compile --quiet --upgrade pyproject.toml --universal --python-version 3.11 --extra dev \
		--generate-hashes --no-annotate --custom-compile-command 'make lock' --output-file requirements.lock

.tools/bin/uv: Makefile
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@
