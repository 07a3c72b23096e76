#!/usr/bin/env bash
# `llm-allreduce demo`, with an environment made for it: scripts/serve_demo.sh [STRATEGY] [vllm|sglang] [--compile] [--keep]
# Makes its own virtual environment; set DEMO_PYTHON to use one that has the engine and this package already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
engine=vllm
for argument in "$@"; do
  case ${argument,,} in vllm | sglang) engine=${argument,,} ;; esac
done
if [[ -n ${DEMO_PYTHON:-} ]]; then
  python=$DEMO_PYTHON
else
  folder=$(environment_of "$engine")
  make_environment "$folder" "$engine"
  python=$folder/bin/python
fi
exec "$python" -m llm_allreduce_plugin demo "$@"
