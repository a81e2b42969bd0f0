"""The real device: models, attention backends, KV buffers, CUDA graphs and sampling on torch, Triton and CUDA."""
