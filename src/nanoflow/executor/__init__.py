"""Running a dense batch: index tensors, buffers, the executors that interpret graph and plan, and the sampler."""
