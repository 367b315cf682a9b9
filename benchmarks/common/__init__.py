"""What several benchmarks share: settings run in turn, records, server processes, names of workloads and rungs."""
