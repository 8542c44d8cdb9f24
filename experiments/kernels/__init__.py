"""What `bench_kernels`, `tune_kernels` and the ahead-of-time tests run: the grids of each family of kernels."""
