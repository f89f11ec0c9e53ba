#!/bin/bash
# Runs every test against the cluster that is up: unit tests, the demo, end-to-end tests.
# Usage: hack/test.sh FOLDER-OF-BUILT-PROGRAMS [FILTER]      (with a filter: the demo, which installs, and the end-to-end tests that fit)
# Tests of `without_engine` have a second cluster, which enforces no network policies, for as long as they take; a filter that begins
# with `without_engine` runs nothing else.
# JUnit results go to target/junit/*.xml; the last line is "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$1 filter=${2:-}
junit=target/junit
rm -rf "$junit"; mkdir -p "$junit"
passed=0 failed=0 began=$SECONDS
# A test that hangs is a failure of its suite, with its name in the output, before whoever waits gives up.
limit="timeout --kill-after=10 --verbose 2400"

# suite NAME COMMAND..: runs libtest programs, shows their output, writes JUnit, counts.
suite() {
  local name=$1 log=$junit/$1.log start=$SECONDS; shift
  printf '\n== %s (at %s s)\n' "$name" $((SECONDS - began))
  "$@" 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]} counts
  counts=$(awk -v suite="$name" -v seconds=$((SECONDS - start)) -v status="$status" -f hack/junit.awk -v out="$junit/$name.xml" "$log")
  passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
  printf '== %s: %s passed, %s failed, %s s\n' "$name" "${counts% *}" "${counts#* }" $((SECONDS - start))
}

# single NAME COMMAND..: one program that passes or fails as a whole.
single() {
  local name=$1; shift
  run_single() {
    if "$@"; then echo "test $name ... ok"; else echo "test $name ... FAILED"; return 1; fi
  }
  suite "$name" run_single "$@"
}

# The second cluster is named after the first, as far as a name goes.
first=${MAYFLY_E2E_NAME:-mayfly}
second=${first:0:4}-plain
case $filter in ''|without_engine*) plain=yes;; *) plain=;; esac
if [ "$plain" ] && [ "$(id -u)" -ne 0 ]; then
  echo "== without_engine: left out: only root can have a cluster without an engine" >&2
  plain=
fi
if [ "$plain" ]; then
  # Meanwhile the unit tests run.
  MAYFLY_E2E_CLUSTER=local "$bin/cluster" --name "$second" up --engine none --also helm,image-gitea-runner,image-gitea-runner-with-boto3 >"$junit/plain-cluster.log" 2>&1 & up=$!
fi

# What only a cluster of this machine has: programs outside and on its node, names of the outside world, the API server's log.
local_only="metadata_is_unreachable service_redirect_is_blocked no_leak_at_start a_stray_policy_cannot_undo host_names_open_what
  a_killed_runner_leaves_nothing the_operator_has_the_permissions the_gates_token_is_none serves_github
  keeps_records uses_clouds uses_credentials vouches_for_jobs
  connections_that_died whom_pods_are_told_to_ask_for_names"
skips=(--skip without_engine::)
if ! "$bin/cluster" env | grep -q "MAYFLY_E2E_CLUSTER='local'"; then
  echo "== e2e: left out, as the cluster is not of this machine:" $local_only
  for test in $local_only; do skips+=(--skip "$test"); done
fi

if [ -z "$filter" ]; then
  suite unit $limit cargo test --release --workspace --no-fail-fast --lib --bins --test reasons --test reference --test rooms
  # The simulator of GitHub, driven by clients of other people.
  suite simulator $limit cargo test --release --workspace --no-fail-fast --test forge --test go_client --test rust_client --test stand_in
fi
if [ -z "$filter" ] && "$bin/cluster" build helm; then
  single generated hack/generate.sh --check "$bin/mayfly" "$("$bin/cluster" path helm)"
fi
if [ "$plain" ]; then
  wait "$up" || cat "$junit/plain-cluster.log"
  MAYFLY_E2E_NAME=$second suite without_engine \
    $limit cargo test --release --workspace --test e2e -- --include-ignored ${filter:-without_engine}
  "$bin/cluster" --name "$second" down
fi
case $filter in without_engine*) ;; *)
  single demo "$bin/demo"
  suite e2e $limit cargo test --release --workspace --test e2e -- --include-ignored --test-threads=4 "${skips[@]}" $filter;;
esac
printf '\n%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
