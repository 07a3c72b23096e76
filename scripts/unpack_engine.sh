#!/usr/bin/env bash
# The Python code of an engine's wheels, to test against versions beside the installed one:
#   scripts/unpack_engine.sh vllm|sglang FOLDER VERSION...
#   scripts/unpack_engine.sh --whole sglang FOLDER VERSION...    # with the transformers that it pins: for whole servers
# Then ALLREDUCE_TEST_VLLM=FOLDER/VERSION:... pytest tests/engines/test_vllm_fusion.py tests/engines/test_vllm_versions.py
# or ALLREDUCE_TEST_SGLANG=FOLDER/VERSION:... pytest tests/engines/test_sglang_versions.py tests/engines/test_sglang.py
set -euo pipefail
whole=
if [[ ${1:-} == --whole ]]; then
  whole=yes
  shift
fi
if (($# < 3)) || [[ $1 != vllm && $1 != sglang ]]; then
  echo "usage: $0 [--whole] vllm|sglang FOLDER VERSION..." >&2
  exit 2
fi
engine=$1
folder=$2
shift 2
python=${PYTHON:-python}
platform=() # that of this machine; vLLM's wheels are for a newer one than some
if [[ $engine == vllm ]]; then platform=(--platform manylinux_2_28_x86_64); fi
mkdir -p "$folder"
for version in "$@"; do
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    "${platform[@]}" --dest "$folder" "$engine==$version"
  "$python" - "$engine" "$folder" "$version" <<'PYTHON'
import shutil
import sys
import zipfile
from pathlib import Path

engine, folder, version = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
(wheel,) = folder.glob(f"{engine}-{version}-*.whl")
shutil.rmtree(folder / version, ignore_errors=True)
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / version, [name for name in archive.namelist() if not name.endswith(".so")])
wheel.unlink()
PYTHON
  if [[ -n $whole ]]; then
    # What it imports and the environment has in another release: transformers, and the two that this is strict about.
    install=("$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/$version")
    pins() {
      "$python" - "$folder/$version" "$@" <<'PYTHON'
import re
import sys
from importlib.metadata import Distribution

folder, of, *names = sys.argv[1:]
(found,) = Distribution.discover(name=of, path=[folder])
for line in found.requires or ():
    if re.split(r"[^a-zA-Z0-9-]", line)[0] in names and ";" not in line:
        print(line)
PYTHON
    }
    mapfile -t wanted < <(pins "$engine" transformers)
    "${install[@]}" "${wanted[@]}"
    rm -rf "$folder/$version/bin" # of which pip would say that it is there already
    mapfile -t wanted < <(pins transformers tokenizers huggingface-hub)
    "${install[@]}" "${wanted[@]}"
  fi
  echo "$folder/$version"
done
