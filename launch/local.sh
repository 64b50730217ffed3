#!/usr/bin/env bash
# Train on this machine without SLURM, starting again whenever a rank was asked to stop (exit code 85) or storage or
# network failed (75), as a cluster would requeue the job.
#   launch/local.sh CONFIG [key=value ...] [--processes N]
# Ctrl-C or TERM to this script stops for good: the state is committed, and the same command goes on.
set -u
stopped=0
pid=
trap 'stopped=1; [ -n "$pid" ] && kill -TERM "$pid" 2>/dev/null' TERM INT
while :; do
  [ "$stopped" -eq 0 ] || exit 85
  began=$SECONDS
  mf-scale train "$@" &
  pid=$!
  # A stop between the last test and this line found no process to pass it to.
  [ "$stopped" -eq 0 ] || kill -TERM "$pid" 2>/dev/null
  wait "$pid"
  # A trapped signal ends `wait` early; the last `wait` gives the true exit code.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"
  code=$?
  # 85: stopped on request, state committed; 75: storage or network failed, go on from the last commit.
  case "$code" in 85|75) [ "$stopped" -eq 0 ] || exit "$code" ;; *) exit "$code" ;; esac
  # A run that ends again soon after every start would go round for ever.
  if [ $((SECONDS - began)) -lt 60 ]; then short=$((${short:-0} + 1)); else short=0; fi
  if [ "$short" -ge 5 ]; then
    echo "launch/local.sh: five starts in a row ended within a minute, giving up" >&2
    exit "$code"
  fi
  echo "== exit code $code: starting again"
done
