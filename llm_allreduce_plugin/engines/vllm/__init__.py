"""vLLM 0.26 to 0.33: the entry point of the ``vllm.general_plugins`` group."""

from llm_allreduce_plugin.engines.vllm.plugin import register

__all__ = ["register"]
