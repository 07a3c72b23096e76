"""What a decision depends on and what it says; one module per strategy; the numbers of them all.

Only the data types are exported here: the strategies use them, and stand together in ``strategies``.
"""

from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision, Launch, PassedOver
from llm_allreduce_plugin.algorithms.facts import GroupFacts

__all__ = ["Algorithm", "Decision", "GroupFacts", "Launch", "PassedOver"]
