"""Measurements: training results, speed and memory. A speed is a ratio to what a user would run instead."""
