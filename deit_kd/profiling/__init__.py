"""What a run takes and where its time goes: forecasts, benchmarks, and checks of the environment."""
