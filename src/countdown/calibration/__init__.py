"""Calibration: text in, the statistics that methods ask for out, nothing kept of the activations."""
