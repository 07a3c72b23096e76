"""The object that an engine holds, what its calls do, and what keeps watch beside them."""
