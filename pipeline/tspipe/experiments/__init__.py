"""What is built on both stages: the paper's tables, reports, benchmarks."""
