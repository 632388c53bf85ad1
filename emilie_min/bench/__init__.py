"""What EMILIE is measured with: benchmarks, runs of methods over them, metrics, reports and the preference study."""
