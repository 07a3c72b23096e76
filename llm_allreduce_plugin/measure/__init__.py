"""What measuring commands and tests share: ranks that are processes, times, answers, and records of both."""
