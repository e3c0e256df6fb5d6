"""Speeds and memory, as ratios against what a user would run instead, measured side by side in one run."""
