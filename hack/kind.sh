#!/bin/bash
# Runs the demo and the end-to-end tests on a cluster of kind's, which is there for as long as they take. Where no Docker daemon answers,
# one is started, and the node's image is built from Debian's packages and Go modules instead of pulled.
# Usage: hack/kind.sh FOLDER-OF-BUILT-PROGRAMS PARTS [FILTERS]          PARTS: what tests need besides the cluster's own, with commas
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 parts=$2 filter=${3:-::}
export MAYFLY_E2E_CLUSTER=kind MAYFLY_E2E_NAME=${MAYFLY_E2E_NAME:-kind}
if ! docker version >/dev/null 2>&1; then
  export MAYFLY_E2E_KIND_NODE=built
  "$bin/cluster" build kind gitea image-kind-node ${parts//,/ }
  "$bin/demo" images
  cargo test --release --workspace --test e2e --no-run
  exec hack/with-docker.sh "$0" "$bin" "$parts" "$filter"
fi
trap '"$bin/cluster" down' EXIT
"$bin/cluster" up --also "$parts"
hack/test.sh "$bin" "$filter"
