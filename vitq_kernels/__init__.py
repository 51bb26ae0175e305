"""Integer kernels for vision transformers: int4/int8 GEMM with a low-rank branch, focusing attention."""
