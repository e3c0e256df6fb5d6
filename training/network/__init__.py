"""The backbone: derivatives, start weights, cached features, several processes."""
