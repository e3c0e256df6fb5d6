"""Training long-tailed recognition models; stages meet as model folders (zoo.model_folder)."""
