"""GPU kernels in Triton, called through jax-triton: for Ampere and Ada, which have no Mosaic; Hopper runs them too."""
