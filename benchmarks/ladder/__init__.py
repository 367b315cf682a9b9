"""The ladder: sequential, nano-batches alone, each way to overlap, and searched plans, on the same workloads."""
