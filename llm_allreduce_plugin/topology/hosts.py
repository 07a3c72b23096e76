"""GPUs of several hosts as one topology: each host as its own ranks see it, and the links between them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from llm_allreduce_plugin.topology.model import NodeTopology

BETWEEN_HOSTS = "NET"


def joined(parts: Sequence[NodeTopology], *, domain: bool = False) -> NodeTopology:
    """The GPUs of these hosts, host after host.

    Args:
        parts: what each host's ranks say of their GPUs.
        domain: NVLink joins all of them; otherwise a network does.

    Returns:
        A topology whose GPUs have ``host`` 0, 1, ... in the order of ``parts``. Nothing is known of peer access between
        hosts: that no driver says anything of it.
    """
    gpus = [
        gpu.model_copy(update={"host": host}) for host, part in enumerate(parts) for gpu in part.gpus
    ]  # as nvidia-smi counts them there
    starts = [sum(len(part.gpus) for part in parts[:host]) for host in range(len(parts))]
    between = _nvlinks(parts) if domain else BETWEEN_HOSTS
    links = [["X" if a == b else between for b in range(len(gpus))] for a in range(len(gpus))]
    p2p = [["X" if a == b else "?" for b in range(len(gpus))] for a in range(len(gpus))]
    for start, part in zip(starts, parts, strict=True):
        for a, (row, statuses) in enumerate(zip(part.links, part.p2p, strict=True)):
            links[start + a][start : start + len(row)] = row
            p2p[start + a][start : start + len(row)] = statuses
    return NodeTopology(
        source=" + ".join(dict.fromkeys(part.source for part in parts)),
        gpus=tuple(gpus),
        links=tuple(map(tuple, links)),
        p2p=tuple(map(tuple, p2p)),
        nvswitch=domain or all(part.nvswitch for part in parts),
        driver=parts[0].driver if parts else "",
    )


def _nvlinks(parts: Sequence[NodeTopology]) -> str:
    """What joins GPUs of one domain: as many NVLinks as inside the hosts; ``?`` where those have one GPU each."""
    found = {link for part in parts for row in part.links for link in row if link.startswith("NV")}
    return min(found, key=lambda link: int(link[2:]), default="?")


def repeated(node: NodeTopology, hosts: int) -> NodeTopology:
    """So many hosts like this one, joined by a network. GPUs of copies have no UUIDs: there are none."""
    copy = node.model_copy(
        update={"gpus": tuple(gpu.model_copy(update={"uuid": "", "fabric": None}) for gpu in node.gpus)}
    )
    return joined([copy] * hosts)
