"""GPU kernels alone and in pairs: time, bandwidth or FLOP/s, and energy, at the shapes of a model's layer."""
