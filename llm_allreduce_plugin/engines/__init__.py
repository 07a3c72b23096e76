"""One folder per engine; nothing outside of it knows the engine."""
