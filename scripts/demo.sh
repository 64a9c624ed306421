#!/usr/bin/env bash
# The demo: fine-tune the built-in model on the shipped dataset, then compare it with its base on rows it never saw.
# Prints every luthier command before running it. Starts from a fresh demo/ folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=${1:-}
if [[ -z $config ]]; then
  # The seed program has a config of its own; the demo is the other example.
  for candidate in examples/*/config.yaml; do
    [[ $candidate == examples/seed/* ]] || config=$candidate
  done
fi
if [[ ! -f $config ]]; then
  echo "demo: no examples/<name>/config.yaml in this checkout" >&2
  exit 1
fi

run() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
}

rm -rf demo
mkdir demo
started=$SECONDS
run luthier train "$config" --output demo/run
run luthier evaluate demo/run

minutes=$(( (SECONDS - started) / 60 )) seconds=$(( (SECONDS - started) % 60 ))
cat <<END

Done in ${minutes} min ${seconds} s. Now it is yours:

  source .venv/bin/activate           # or write .venv/bin/luthier below
  luthier chat demo/run               # talk to the tuned model
  open demo/run/report.html           # curves, samples before and after, data and config
  luthier init your_table.csv         # a config for your own data
END
