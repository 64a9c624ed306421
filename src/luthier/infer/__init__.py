"""Generation: one engine behind prediction, evaluation and chat (`generate`), and how an answer is drawn (`sampling`).

Import `luthier.infer.sampling` for the settings alone: it needs no torch. `luthier.infer.generate` does.
"""
