"""Writes the table of docs/decisions.md: what runs at which size on the recorded nodes, by the policy itself.

python scripts/decision_table.py            # rewrites the page's table
python scripts/decision_table.py --check    # exits 1 when the page is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from llm_allreduce_plugin import AllReduceConfig, NodeTopology
from llm_allreduce_plugin.algorithms import GroupFacts
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.selection.sweep import name_of, sweep

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "decisions.md"
BEGIN, END = "<!-- made by scripts/decision_table.py -->", "<!-- end -->"
SIZES = {"4 KiB": 4 << 10, "32 KiB": 32 << 10, "256 KiB": 256 << 10, "2 MiB": 2 << 20, "64 MiB": 64 << 20}
# Name, file, ranks.
NODES = (
    ("4x H200, NVSwitch", "h200_x4_nvswitch", 4),
    ("8x H100, NVSwitch", "h100_x8_nvswitch", 8),
    ("GB200 NVL72, 4 GPUs of a host", "gb200_x72_nvl72", 4),
    ("GB200 NVL72, 8 GPUs of 2 hosts", "gb200_x72_nvl72", 8),
    ("8x L40S, two NUMA domains", "l40s_x8_two_numa", 8),
    ("8x RTX 4090, no peer access", "rtx4090_x8_no_p2p", 8),
)
STRATEGIES = ("AUTO", "LOWPRECISION")


def _from(config: AllReduceConfig, facts: GroupFacts, dtype: str) -> str:
    """From which size on each further thing runs."""
    found = sweep(config, facts, dtype)
    changes = [
        row for before, row in zip([None, *found], found, strict=False) if before is None or before.name != row.name
    ]
    words = [f"`{changes[0].name}`"]
    for row in changes[1:]:
        size = row.first_bytes
        text = f"{size / (1 << 20):.3g} MiB" if size >= 1 << 20 else f"{size / 1024:.3g} KiB"
        words.append(f"from {text} `{row.name}`")
    return ", ".join(words)


def table() -> str:
    """The part of the page between the marks."""
    parts = []
    for strategy in STRATEGIES:
        config = AllReduceConfig(allreduce_strategy=strategy)
        parts += [f"`allreduce_strategy: {strategy}`, bf16, bytes per rank:", ""]
        parts += [f"| node | memory | {' | '.join(SIZES)} | changes |", f"|---|---|{'---|' * len(SIZES)}---|"]
        for label, name, ranks in NODES:
            topology = NodeTopology.from_json(ROOT / "configs" / "topologies" / f"{name}.json")
            facts = group_facts(topology, ranks, config)
            cells = [name_of(decide(config, facts, size // 2, "bfloat16")) for size in SIZES.values()]
            memory = facts.transport.in_words.removesuffix(" memory")
            parts.append(f"| {label} | {memory} | {' | '.join(cells)} | {_from(config, facts, 'bfloat16')} |")
        parts.append("")
    return "\n".join(parts).strip()


def with_table(page: str) -> str:
    """The page with the table that the policy makes now."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    page = PAGE.read_text()
    new = with_table(page)
    if "--check" in sys.argv[1:]:
        if new != page:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run scripts/decision_table.py")
            return 1
        return 0
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
