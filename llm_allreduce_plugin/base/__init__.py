"""What knows nothing of all-reduce: files and documents from outside, processes, steps that all ranks take, ends."""
