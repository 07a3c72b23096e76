"""``python -m llm_allreduce_plugin``: the same as ``llm-allreduce``."""

from llm_allreduce_plugin.cli import main

if __name__ == "__main__":
    main()
