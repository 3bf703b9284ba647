"""How good a network is: metrics, reports, predictions, and ImageNet's other benchmarks."""
