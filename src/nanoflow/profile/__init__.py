"""What was measured of a device, as a file: times, energies, interference. The profiler writes it. No torch."""
