"""Fused operations of the decoder, each beside its plain reference. Nothing here knows of models, ranks or plans.

    norm.py       RMSNorm and its gradient
    rotary.py     the fused query-key-value product -> rotated heads
    glu.py        gated activation of the fused gate-up product
    logprob.py    hidden states -> log-probabilities of chosen tokens, without all logits at once
    nf4.py        4-bit weights -> the compute type, into a reused buffer
    keyed.py      dropout whose mask depends on the sample and the position, not on the batch
    attention.py  causal attention over packed samples: varlen Flash, or rows padded for SDPA
    linear.py     matrix products with norm, gate and low-rank update, one autograd node each
    prepacked.py  a matrix laid out for short products on a CPU, for generation
    host.py       a step of generation on a CPU, in fewer operations
    host_training.py  the same for training an adapter there: products, attention, loss
    cpu/          a step of generation on a CPU compiled by numba, where that is installed
    gpu/          the same operations in Triton, used on CUDA; cached.py there reads a key-value cache

The plain form defines what is computed, in any floating type; the Triton form computes the same at memory speed.
Shapes in names: ``t`` tokens, ``h`` hidden, ``f`` intermediate, ``d`` head dimension, ``n`` chosen tokens,
``v`` vocabulary, ``r`` rank.
"""
