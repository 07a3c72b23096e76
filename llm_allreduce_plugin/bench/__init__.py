"""Measurements: how long an all-reduce takes, and whether its answer is right."""
