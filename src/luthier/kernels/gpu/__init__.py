"""The operations of `luthier.kernels` in Triton. Same arguments and results as the plain forms, which call them."""
