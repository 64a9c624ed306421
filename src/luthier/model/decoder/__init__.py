"""The shared decoder of the first-class architectures: packed passes, weights placed by a plan, adapters as data.

shape.py    what an architecture is made of, from its config
weights.py  the placements of a frozen matrix
load.py     safetensors -> placed weights
lora.py     low-rank pairs, how they start, PEFT's file format
layer.py    one layer in the order it happens
decoder.py  embedding -> layers -> norm -> log-probabilities
nodes.py    small differentiable steps: norm, rotation, selecting, recomputing
"""
