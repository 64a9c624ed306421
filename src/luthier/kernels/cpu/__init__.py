"""Operations of a step of generation, compiled for this CPU by numba where it is installed (``luthier[cpu]``).

    programs.py  the loops
    step.py      the same over tensors, and whether they can be used

`luthier.kernels.host` has the plain forms.
"""
