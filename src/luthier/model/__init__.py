"""The model in memory: loading a base, adapters beside it, and log-probabilities out of it. Needs torch."""
