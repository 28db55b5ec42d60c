"""Import paths of flash-attn's Triton kernels. Behind them is plain torch, which runs on every device."""
