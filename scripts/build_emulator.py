"""Compiles the CUDA kernels for a CPU, as they are and with planted errors, which ``tests/kernels`` would do first.

    python scripts/build_emulator.py

What was compiled before for the same sources is taken from ``build/emulator``. Where a compiler or headers are
missing, it does nothing: those tests are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import emulator


def main() -> int:
    if (obstacle := emulator.obstacle()) is not None:
        print(f"not compiled: {obstacle}")
        return 0
    from tests.kernels.test_mutations import mutated

    emulator.library()
    mutated()
    return 0


if __name__ == "__main__":
    sys.exit(main())
