#!/usr/bin/env bash
# Serves a small model with vLLM at tensor parallel 2, all-reduces on our kernels: scripts/serve_demo.sh [STRATEGY] [--compile] [--keep]
# Makes its own virtual environment; set DEMO_PYTHON to use one that has vLLM and this package already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
if [[ -n ${DEMO_PYTHON:-} ]]; then
  python=$DEMO_PYTHON
else
  make_environment .venv
  python=.venv/bin/python
fi
exec "$python" scripts/serve_demo.py "$@"
