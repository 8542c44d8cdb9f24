"""GPU kernels in Pallas, one file for each op of moejax/ops; they see local arrays and know no mesh and no config."""
