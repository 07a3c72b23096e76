"""How settings are read: what values mean, which documents and variables are taken, and how a wrong one is told.

``config.py`` has the settings themselves.
"""
