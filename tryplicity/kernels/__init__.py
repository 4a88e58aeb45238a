"""Products and small operations in compiled C++, for decoding on a CPU."""
