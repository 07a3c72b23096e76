"""The start of a group: what ranks tell each other, what its decisions depend on, and its workspace."""
