# make demo: train on the embedded corpus, then two adapters; push all to a Hub on this machine, pull, swap, evaluate;
#            a page of results in runs/demo-report.
# make test: lint and tests.
# Both set up .venv first, when it is missing or pyproject.toml is newer.
PYTHON ?= python3
BIN := .venv/bin
TRAIN = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $$(nproc) train_hf.py
SHORT := --steps 60 --evaluate_every 30 --tests '{}'

.PHONY: demo test

demo: .venv/ready
	rm -rf runs/demo runs/demo-telephony runs/demo-noisy
	$(TRAIN) --output runs/demo
	$(TRAIN) adapters/telephony.yaml --model runs/demo/best $(SHORT) --output runs/demo-telephony
	$(TRAIN) adapters/noisy.yaml --model runs/demo/best $(SHORT) --output runs/demo-noisy
	$(BIN)/python examples/adapters_over_the_hub.py runs/demo/best telephony=runs/demo-telephony/best \
		noisy=runs/demo-noisy/best --local --owner demo --trials data/synthetic/test/trials.txt \
		--folder data/synthetic/test/wav --noise data/synthetic/train
	$(BIN)/mrl-redimnet evaluate runs/demo/best --trials data/synthetic/test/trials.txt \
		--folder data/synthetic/test/wav --page runs/demo-report

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@
