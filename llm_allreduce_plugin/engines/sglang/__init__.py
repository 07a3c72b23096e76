"""SGLang 0.5.17 to 0.5.23: the entry point of the ``sglang.srt.plugins`` group."""

from llm_allreduce_plugin.engines.sglang.plugin import register

__all__ = ["register"]
