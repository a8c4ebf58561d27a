"""Evaluation: perplexity, and tasks through lm-eval, on the path that runs the model, and results that compare."""
