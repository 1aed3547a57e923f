"""How good samples are: metrics, calibration, tables."""
