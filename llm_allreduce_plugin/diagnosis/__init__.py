"""Whether this node and this Python environment will work: probes that look, and processes that prove.

Every probe is a function of what it is given, so that it can be tried on machines that nobody has, and returns
findings; none raises.
"""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.diagnosis import hardware, limits, proof, software
from llm_allreduce_plugin.diagnosis.finding import Finding, Verdict, guarded, warn
from llm_allreduce_plugin.group.capabilities import cpu_facts, group_facts
from llm_allreduce_plugin.group.layouts import (
    DEFAULT_CPU_WORKSPACE_BYTES,
    DEFAULT_HOST_WORKSPACE_BYTES,
    peer_refusal,
    transports,
)
from llm_allreduce_plugin.profiles.search import with_profile
from llm_allreduce_plugin.selection.policy import describe
from llm_allreduce_plugin.topology import NodeIdentity, NodeTopology, view_of
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.topology.visible import BUS_ORDER, ORDER_VARIABLE

__all__ = ["Finding", "Verdict", "look", "prove"]


def look() -> tuple[list[Finding], NodeTopology | None]:
    """Everything that can be told without starting processes. Takes no GPU memory.

    Returns:
        What was found; and what ranks would run on, None when that is nothing because all GPUs are hidden.
    """
    node = NodeTopology.detect()
    view = view_of(node)
    topology = view.topology
    gpus = len(topology.gpus)
    setting, config = software.settings()
    ranks = 0 if view.hides_all else _ranks(gpus, config)
    setting = software.settings_for(setting, config, ranks)
    default = DEFAULT_HOST_WORKSPACE_BYTES if gpus else DEFAULT_CPU_WORKSPACE_BYTES * ranks
    wanted = default if config.workspace_bytes is None else int(config.workspace_bytes) * max(ranks, 1)
    through_peers = Transport.SYMMETRIC in transports(config, "cuda", peer_refusal())
    needed = not gpus or not through_peers or topology.p2p_fault(range(ranks)) is not None

    found = guarded("package", software.package)
    found += guarded("Python", software.python)
    found += guarded("torch", lambda: software.torch(software.installed("torch"), gpus=len(node.gpus)))
    found += guarded(
        "driver",
        lambda: software.driver(topology.driver, software.cuda_of_driver(), software.toolkit_of_library(), gpus=gpus),
    )
    found += guarded("GPUs", lambda: hardware.gpus(topology, hidden=len(node.gpus) if view.hides_all else 0))
    found += guarded("GPUs", lambda: list(filter(None, [hardware.left_out(node)])))
    found += [warn("GPU order", note, f"set {ORDER_VARIABLE}={BUS_ORDER}") for note in view.notes]
    if gpus:
        shown = {gpu.index for gpu in topology.gpus}
        states = [state for state in hardware.read_states() if state.index in shown]
        found += guarded("GPU sharing", lambda: hardware.sharing(states))
    if gpus > 1:
        found += guarded("links", lambda: hardware.links(topology))
        found += guarded("fabric", lambda: hardware.multicast(topology))
        found += guarded("NVLink domain", lambda: list(filter(None, [hardware.domain(topology)])))
        found += guarded("PCIe path", lambda: hardware.peer_path(topology))
    found += guarded("shared memory", lambda: limits.shared_memory(wanted, needed=needed))
    found += guarded("locked memory", lambda: limits.pinned_memory(wanted, needed=needed and gpus > 0))
    found += guarded("memory limit", lambda: limits.memory_limit(wanted))
    found += guarded("container", limits.container)
    other = software.installed("sglang")
    found += guarded("vLLM", lambda: software.vllm(software.installed("vllm"), needed=other is None))
    found += guarded("SGLang", lambda: software.sglang(other))
    found.append(setting)
    found += guarded("environment", lambda: software.variables(transport=str(config.transport)))
    if ranks < 2 or setting.verdict is not Verdict.OK:  # noqa: PLR2004
        return found, None if view.hides_all else topology

    def group() -> tuple[GroupFacts, NodeIdentity]:
        if gpus:
            return group_facts(topology, ranks, config, peer_refusal()), NodeIdentity.of_gpus(node)
        return cpu_facts(ranks, config), NodeIdentity.of_cpu()

    def runs() -> Finding:
        facts, _ = with_profile(config, *group())
        sizes = describe(config, facts)
        return Finding("what runs", Verdict.OK, f"{config.allreduce_strategy} over {ranks} ranks: {sizes}")

    found += guarded("tuning profile", lambda: software.tuning_profile(config, *group()))
    found += guarded("what runs", runs)
    return found, topology


def _ranks(gpus: int, config: AllReduceConfig) -> int:
    """Of the group that is spoken of: as many as ``low_precision.domains`` names, else all that can be."""
    domains = config.low_precision.domains
    if domains is not None and (not gpus or len(domains) <= gpus):
        return len(domains)
    return proof.largest_group(gpus) if gpus else 2


def prove(topology: NodeTopology, runner: proof.Runner) -> list[Finding]:
    """That ranks reach each other on this node, by doing it. Starts processes; takes seconds, at most minutes.

    ``runner``: proves one thing, as a :class:`~llm_allreduce_plugin.diagnosis.proof.Prover` does.
    """
    _, config = software.settings()
    return guarded("proof", lambda: proof.findings(topology, config, runner))
