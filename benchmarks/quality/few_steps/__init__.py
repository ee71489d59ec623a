"""Compare models and samplers at few evaluations of the network: ``python -m benchmarks few-steps``."""
