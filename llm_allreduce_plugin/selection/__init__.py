"""Which strategy runs for a message, and why: ``policy`` has the pure functions, ``sweep`` the same over all sizes."""
