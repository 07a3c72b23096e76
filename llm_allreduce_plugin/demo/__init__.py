"""``llm-allreduce demo``: a server of an engine that shows the all-reduce at work, with or without GPUs."""
