"""YAML to runs: what is varied, and every run that a sweep is made of. No model is built here."""
