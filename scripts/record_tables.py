"""Writes the tables of measurements in the documentation, from the records in benchmarks/.

python scripts/record_tables.py            # rewrites the tables between their marks
python scripts/record_tables.py --check    # exits 1 when a page is out of date

A table stands between <!-- table: NAME --> and <!-- end -->; NAME is a key of TABLES below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import engine_tables, format_tables, kernel_tables
from benchmarks.tables import MIB

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: ([a-z0-9_]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_STOCK = {"default": "stock vLLM"}
_OURS = {"MINLATENCY": "MINLATENCY"}
_LOW = {"LOWPRECISION": "LOWPRECISION, fp8"}
_FUSED = {"MINLATENCY-unfused": "MINLATENCY, norm left to vLLM", "MINLATENCY": "MINLATENCY, norm fused"}
TABLES: dict[str, Callable[[], str]] = {
    "nvlink": lambda: kernel_tables.beside("bench", kernel_tables.PEERS),
    "nvlink_h100": kernel_tables.nvlink_h100,
    "formats_h100_tp2": kernel_tables.formats_h100_tp2,
    "formats_h100_tp4": kernel_tables.formats_h100_tp4,
    "flagged_packets": kernel_tables.flagged_packets,
    "fp8_in_steps": kernel_tables.fp8_in_steps,
    "two_hosts": kernel_tables.two_hosts,
    "host_memory_h100": kernel_tables.host_memory_h100,
    "nvlink_h100_tp4": kernel_tables.nvlink_h100_tp4,
    "between_products": kernel_tables.between_products,
    "workspaces": lambda: kernel_tables.workspaces(2),
    "workspaces_tp4": lambda: kernel_tables.workspaces(4),
    "host_memory": kernel_tables.host_memory,
    "host_link": lambda: kernel_tables.host_link(2),
    "host_link_tp4": lambda: kernel_tables.host_link(4, MIB),
    "host_asks_first": kernel_tables.host_asks_first,
    "fused": kernel_tables.fused,
    "fused_tp4": kernel_tables.fused_tp4,
    "fused_quant": kernel_tables.fused_quant,
    "registered": kernel_tables.registered,
    "codecs": kernel_tables.codecs,
    "shipped": lambda: kernel_tables.beside("bench_peers", kernel_tables.SHIPPED),
    "shipped_with_norm": lambda: kernel_tables.beside("bench_fused_peers", kernel_tables.SHIPPED_WITH_NORM),
    "fused_hidden": kernel_tables.fused_hidden,
    "pushing_warps": kernel_tables.pushing_warps,
    "product_by_gpc": kernel_tables.product_by_gpc,
    "shipped_by_sglang": kernel_tables.sglang,
    "before_and_after": kernel_tables.before_and_after,
    "eager": kernel_tables.eager,
    "start": kernel_tables.start,
    "forms": kernel_tables.forms,
    "vllm_fused_8192_tp2": lambda: engine_tables.tokens(
        "h200/vllm_fused_8192_tp2",
        _STOCK | {"default-flashinfer": "vLLM with FlashInfer's fused kernel"} | _FUSED,
        more="h200/vllm_flashinfer_8192_tp2",
    ),
    "vllm_fused_4096_tp2": lambda: engine_tables.tokens("h200/vllm_fused_4096_tp2", _STOCK | _FUSED),
    "vllm_gpu_tp4": lambda: engine_tables.tokens("h200/vllm_gpu_tp4", _STOCK | _FUSED | _LOW, of_gpu=True),
    "vllm_together_tp2": lambda: engine_tables.tokens("h200/vllm_together_tp2", _STOCK | _FUSED, of_gpu=True),
    "vllm_together_tp2_h100": lambda: engine_tables.tokens("h100/vllm_together_tp2", _STOCK | _FUSED, of_gpu=True),
    "vllm_together_tp4": lambda: engine_tables.tokens(
        "h100/vllm_together_tp4",
        _STOCK | _FUSED | {"MINLATENCY-as-before": "MINLATENCY, norm fused, as before"},
        of_gpu=True,
    ),
    "sglang_together_tp4": lambda: engine_tables.tokens("h100/sglang_together_tp4", engine_tables.OF_SGLANG),
    "vllm_fused_8192_tp2_h100": lambda: engine_tables.tokens("h100/vllm_fused_8192_tp2", _STOCK | _FUSED),
    "vllm_fused_4096_tp2_h100": lambda: engine_tables.tokens("h100/vllm_fused_4096_tp2", _STOCK | _FUSED),
    "vllm_tokens_8192_tp2_h100": lambda: engine_tables.tokens("h100/vllm_tokens_8192_tp2", _FUSED),
    "vllm_fused_8192_tp4_h100": lambda: engine_tables.tokens("h100/vllm_fused_8192_tp4", _FUSED),
    "vllm_fp8_stock_tp2": lambda: engine_tables.tokens("h200/vllm_fp8_stock_tp2", _STOCK | _FUSED),
    "vllm_fused_fp8_tp2": lambda: engine_tables.tokens("h200/vllm_fused_fp8_tp2", _FUSED),
    "vllm_ub_tp2": lambda: engine_tables.tokens(
        "h200/vllm_ub_tp2",
        {"MINLATENCY-unfused": "MINLATENCY, norm left to vLLM", "UB-unfused": "UB, norm left to vLLM"},
    ),
    "vllm_ub_tp4": lambda: engine_tables.tokens(
        "h200/vllm_ub_tp4", _STOCK | _FUSED | {"UB-unfused": "UB, norm left to vLLM"}
    ),
    "vllm_host_tp2": lambda: engine_tables.tokens("h100/vllm_host_tp2", {"default": "vLLM with NCCL"} | _OURS | _LOW),
    "vllm_8192_tp2": lambda: engine_tables.tokens(
        "h200/vllm_8192_tp2", _STOCK | _OURS | {"AUTO": "AUTO, by a profile of `tune`"}
    ),
    "vllm_8192_tp4": lambda: engine_tables.tokens("h200/vllm_8192_tp4", _STOCK | _OURS),
    "vllm_8192_tp4_host": lambda: engine_tables.tokens(
        "h200/vllm_8192_tp4_host", {"default": "vLLM with NCCL"} | _OURS | _LOW
    ),
    "sglang": engine_tables.sglang,
    "host_cost": kernel_tables.host_cost,
    "error_of_one": format_tables.error_of_one,
    "error_of_model": format_tables.error_of_model,
    "formats": format_tables.formats,
    "error_of_algorithms": format_tables.error_of_algorithms,
}


def with_tables(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> int:
    """Rewrites or checks all pages."""
    wrong = []
    for page in PAGES:
        text = page.read_text()
        if (made := with_tables(text)) != text:
            wrong.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(made)
    if wrong and "--check" in sys.argv[1:]:
        print(f"{', '.join(wrong)}: not of the records as they are: python scripts/record_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
