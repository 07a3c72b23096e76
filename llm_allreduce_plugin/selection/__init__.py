"""Which strategy runs for a message, and why.

``policy`` has the pure functions, ``tables`` the seed thresholds. Only the data types are exported here: strategies use
them, and ``policy`` uses the strategies.
"""

from llm_allreduce_plugin.selection.decision import Algorithm, Decision, Launch, PassedOver
from llm_allreduce_plugin.selection.facts import GroupFacts, Transport

__all__ = ["Algorithm", "Decision", "GroupFacts", "Launch", "PassedOver", "Transport"]
