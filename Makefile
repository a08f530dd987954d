# What a person types. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-faults test-long test-ui test-clients fuzz k8s-check bench parity lint fmt proto models

export ORT_DYLIB_PATH ?= $(CURDIR)/third_party/onnxruntime/lib/libonnxruntime.so
PYTHON ?= python3
FUZZ_SECONDS ?= 60

# A PostgreSQL server for the tests of what many orchestrators share, in a folder that its own user can reach; another checkout has another.
POSTGRES := /tmp/dnd-postgres-$(firstword $(shell echo "$(CURDIR)" | cksum))
with_postgres = trap 'scripts/postgres.sh $(POSTGRES) stop' EXIT; url=$$(scripts/postgres.sh $(POSTGRES)); export DND_TEST_POSTGRES=$$url;

# Where the tests are that take long and need no other library's models, as those of `make parity` do.
LONG := demo entries faults hostile large network plan serving telemetry

help: ## list what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

setup: ## put ONNX Runtime in place (part of demo and test)
	@scripts/setup.sh

build: setup ## build `dnd` and the services into target/release, ONNX Runtime beside them
	cargo build --release --locked --workspace --bins
	@ln -sf "$(ORT_DYLIB_PATH)" target/release/libonnxruntime.so

demo: setup ## label the neurons of two small networks with the whole mesh; reports in out/demo
	cargo build --release --locked -p dnd-cli
	@ln -sf "$(ORT_DYLIB_PATH)" target/release/libonnxruntime.so
	target/release/dnd demo --out out/demo

test: setup ## all tests but the long ones (installs what they need: PostgreSQL, Chromium and Go of Debian, packages of npm and pip)
	@scripts/photographs.sh
	cargo build --workspace --bins --locked
	$(with_postgres) cargo test --workspace --locked
	scripts/k8s.sh
	scripts/lint.sh proto
	scripts/clients.sh test
	scripts/ui.sh

test-long: test ## the tests that take long, too
	$(with_postgres) cargo test --workspace --locked $(LONG:%=--test %) -- --ignored --nocapture
	scripts/objects.sh

test-faults: setup ## kill services, orchestrators and PostgreSQL 200 times in the middle of jobs, and compare the results
	cargo build --workspace --bins --locked
	$(with_postgres) cargo test -p dnd-tests --test faults --locked -- --ignored --nocapture

k8s-check: setup ## hold k8s/ and deploy/ against Kubernetes' schemas, the code and the programs, without a cluster (part of test)
	cargo build --workspace --bins --locked
	scripts/k8s.sh

fuzz: ## fuzz what takes bytes from anyone, FUZZ_SECONDS each (needs a nightly compiler and `cargo install cargo-fuzz`)
	@for entry in requests pictures networks tokenizers schedulers answers; do \
		mkdir -p fuzz/corpus/$$entry; \
		cargo +nightly fuzz run $$entry fuzz/corpus/$$entry fuzz/seeds/$$entry -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -timeout=20; \
	done

test-ui: setup ## the pages in a browser (part of test)
	scripts/ui.sh

test-clients: setup ## the clients in Python, TypeScript and Go, each against `dnd` over the mesh (part of test)
	scripts/clients.sh test

bench: setup ## benchmarks: ratios against a reference in the same run
	cargo bench --workspace --bench '*' --locked

parity: setup ## make the goldens of the Python references anew, at full size too, and compare (installs PyTorch; most of an hour)
	scripts/parity.sh

lint: setup ## format, clippy, dependencies, proto
	cargo fmt --all -- --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	scripts/lint.sh

fmt: ## format the code
	cargo fmt --all

proto: ## lint the API, and hold it against the last release's (part of test)
	scripts/lint.sh proto

models: ## train and export the sketch suite again, from nothing (hours)
	cd models && $(PYTHON) -m train.all
