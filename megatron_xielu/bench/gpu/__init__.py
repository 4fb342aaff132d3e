"""Speed of the GPU kernels against copies and everything else that computes the same."""
