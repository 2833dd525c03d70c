"""What can be said of the GPU kernels without a GPU: `make gpu-static` writes docs/gpu_static.md and .json."""
