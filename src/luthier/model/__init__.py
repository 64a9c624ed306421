"""The model in memory: loading a base, adapters beside it, and log-probabilities out of it. Needs torch."""

import logging

# PEFT imports bitsandbytes always, which then warns of an optional CPU kernel even where nothing is quantised.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
