# `make demo` and `make test` are all a newcomer needs: both do their own set-up and are quick when repeated.
# They need Linux (Debian 12 or like it), root, Rust and Go; see README.md.

SHELL := /bin/bash
TARGET := $(shell rustc --print host-tuple)
BIN := target/$(TARGET)/release
CARGO := cargo
# Everything is built with one profile and for the whole workspace at once, so that demo, tests and benchmarks share every object.
BUILD := $(CARGO) build --release --workspace
# Parts that demo, tests and benchmarks need besides the cluster's own: Helm, the runners' images, and a store.
also := helm,image-gitea-runner,image-gitea-runner-with-boto3,minio
# Tests have more of what trusts a job's token.
test: also := $(also),clouds

.PHONY: demo test kind bench lint generate up down status clean help

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: up-and-build ## A real workflow in a one-job pod, from nothing: cluster, forge, operator, push, job, nothing left
	@$(BIN)/demo

test: up-and-build ## Every test; JUnit results in target/junit, the last line is "N passed, N failed"
	@hack/test.sh $(BIN)

kind: $(BIN)/cluster ## The demo and the end-to-end tests on kind, with a Docker daemon of its own where none answers
	@$(BUILD) --bins && hack/kind.sh $(BIN) $(also)

bench: up-and-build ## Figures, one a line as "name value unit", and in target/bench.json
	@$(BIN)/bench

# The cluster's parts are Go programs and take longest: they are built while cargo builds ours.
.PHONY: up-and-build
up-and-build: $(BIN)/cluster
	@$(BIN)/cluster up --also $(also) & up=$$!; \
	  $(BUILD) --bins || { kill $$up; wait $$up; exit 1; }; \
	  wait $$up

$(BIN)/cluster: FORCE
	@$(CARGO) build --release --workspace --bin cluster
.PHONY: FORCE
FORCE:

up: $(BIN)/cluster ## Bring the test cluster up
	@$(BIN)/cluster up

down: $(BIN)/cluster ## Stop the test cluster and remove it
	@$(BIN)/cluster down

status: $(BIN)/cluster ## Show the test cluster's health
	@$(BIN)/cluster status

lint: ## Format and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

generate: ## Write everything that is generated from the code
	@$(BUILD) --bins && $(BIN)/cluster build helm && hack/generate.sh $(BIN)/mayfly "$$($(BIN)/cluster path helm)"

clean: down ## Stop the cluster and remove what was built here (not the caches in ~/.cache)
	$(CARGO) clean
