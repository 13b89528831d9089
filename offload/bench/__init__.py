"""Side-by-side benchmarks: what users do today, and our caches, in one run on one machine."""
