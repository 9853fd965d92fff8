"""Operations on sparse top-K token distributions, in torch (the specification) and Triton (its kernel)."""
