"""Operations on sparse top-K token distributions, in torch (the reference) and Triton (the kernels)."""
