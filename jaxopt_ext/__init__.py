"""Numerical optimization in JAX, differentiable through one implicit layer."""
