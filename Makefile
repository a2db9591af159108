# Everything runs in .venv, made by the first target that needs it; nothing global is touched.
#   make finetune TASK=ner ARGS="train.max_steps=20 data.train=my.csv" NPROC=2
SHELL := /bin/bash
TASK ?= ner
CONFIG ?= configs/$(TASK).yaml
ARGS ?=
NPROC ?= 1
RETRIES ?= 0
PYTHON ?= python3
CHECKPOINT ?= runs/$(TASK)
HUB ?= hub.data
BIN := .venv/bin
# Literally: a dollar sign in a text is no variable of make.
predict: override export INPUT := $(value INPUT)

.DEFAULT_GOAL := help
.PHONY: help setup lint assets plan finetune evaluate reproduce predict push pull serve-hub config test verify check format bench-peer attention reliability clean

help:  ## Show every target, one line each
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/.ready  ## Make .venv with everything pinned (other targets do it by themselves)

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "heedful needs Python 3.11 or newer: make PYTHON=python3.11 ..."'
	@echo 'setting up .venv with everything pinned: a few minutes the first time'
	$(PYTHON) -m venv .venv
	# torch first, by its pinned version: a range would be filled with gigabytes of CUDA packages.
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

assets: .venv/.ready  ## Fetch and check the models and data of TASK (finetune does it by itself)
	$(BIN)/heedful assets $(TASK)

plan: .venv/.ready  ## Say what finetuning TASK will need in memory and time, measured on two updates
	$(BIN)/heedful plan "$(CONFIG)" $(ARGS)

finetune: .venv/.ready  ## Fine-tune TASK (or CONFIG=my.yaml) with ARGS="key=value ..." on NPROC processes
	$(BIN)/heedful finetune "$(CONFIG)" $(ARGS) --nproc $(NPROC) --retries $(RETRIES)

evaluate: .venv/.ready  ## Score CHECKPOINT on its run's data, or with ARGS="data.test=my.csv"
	@$(BIN)/heedful evaluate "$(CHECKPOINT)" $(ARGS)

reproduce: .venv/.ready  ## Train CHECKPOINT's run again, on NPROC processes, and say whether every bit is the same
	$(BIN)/heedful reproduce "$(CHECKPOINT)" $(ARGS) --nproc $(NPROC)

predict: .venv/.ready  ## Answers of CHECKPOINT for INPUT, a file or a text, as JSON lines
	@$(BIN)/heedful predict -- "$(CHECKPOINT)" "$$INPUT" $(ARGS)

push: .venv/.ready  ## Show what of CHECKPOINT would go to REPO (owner/name or file:///folder), and ask; ARGS="--private --yes"
	@$(BIN)/heedful push "$(CHECKPOINT)" "$(REPO)" $(ARGS)

pull: .venv/.ready  ## Fetch REPO from a hub, every file verified; ARGS="FOLDER --revision v1"
	@$(BIN)/heedful pull "$(REPO)" $(ARGS)

serve-hub: .venv/.ready  ## Serve a hub of your own from HUB, a folder; ARGS="--port 8765"
	@$(BIN)/heedful serve-hub "$(HUB)" $(ARGS)

config: .venv/.ready  ## Print the resolved configuration of TASK with every default
	@$(BIN)/heedful config $(CONFIG) $(ARGS)

test: .venv/.ready  ## Run the tests (under 10 minutes on 2 cores)
	$(BIN)/pytest -m "not slow" -n 2

verify: .venv/.ready  ## Run the slower proofs too: kill -9 at many points, every family with every task (an hour)
	$(BIN)/pytest -n 2

check: lint test  ## Format, lint, types and tests, without changing a file

lint: .venv/.ready  ## Format, lint and types alone
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.ready  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-peer: .venv/.ready  ## Measure against transformers' Trainer, both sides in one run
	$(BIN)/python -m scripts.bench_peer $(ARGS)

attention: .venv/.ready  ## Measure every attention variant into docs/attention/ (hours; ARGS="speed" for a part)
	$(BIN)/python -m scripts.bench_attention $(or $(ARGS),all)

reliability: .venv/.ready  ## Write docs/reliability.md from the tests' tables of faults
	$(BIN)/python tests/fault_table.py docs/reliability.md

clean:  ## Remove caches; keeps .venv, assets and runs
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
