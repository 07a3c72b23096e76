# Sourced by smoke_nvswitch.sh and smoke_pcie.sh: correctness of every strategy that this node can run, then a short serve with
# each engine. Settings:
#   SMOKE_ENGINES  those to serve with (default: "vllm sglang")
#   DEMO_PYTHON    an interpreter that has torch, these engines, pytest and this package (default: environments are made)

skip() {
  echo "SKIPPED: $1"
  exit 0
}

summary=()
failed=0

step() {
  local name=$1
  shift
  echo "== $name"
  if "$@"; then
    summary+=("ok      $name")
  else
    summary+=("FAILED  $name")
    failed=1
  fi
}

prepare() {
  source scripts/environment.sh
  has_nvidia_gpus || skip "no NVIDIA GPU on this node"
  if [[ -n ${DEMO_PYTHON:-} ]]; then
    python=$DEMO_PYTHON
  else
    make_environment .venv vllm
    python=.venv/bin/python
    install_tools .venv
  fi
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  ((gpus >= 2)) || skip "$gpus GPU on this node; tensor parallelism needs two"
}

# has_nvswitch: the links as NVML reports them.
has_nvswitch() {
  "$python" -c 'import sys; from llm_allreduce_plugin.topology import detect; sys.exit(not detect().nvswitch)'
}

run_smoke() {
  step "topology" "$python" -c 'from llm_allreduce_plugin.cli import main; main()' topo
  step "correctness on $gpus GPUs" "$python" -m pytest -q tests/gpu
  local engine strategy
  for engine in ${SMOKE_ENGINES:-vllm sglang}; do
    for strategy in ONESHOT TWOSHOT; do
      # Without DEMO_PYTHON the demo takes the engine's own environment.
      step "serve with $engine, $strategy" scripts/serve_demo.sh "$strategy" "$engine"
    done
  done
  printf '\n== summary\n'
  printf '%s\n' "${summary[@]}"
  exit "$failed"
}
