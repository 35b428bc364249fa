"""lm-eval: task files, data, questions and results."""
