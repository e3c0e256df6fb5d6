"""The method: losses, class covariances, the MetaSAug step and its naive reference."""
