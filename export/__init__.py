"""From a model folder to what others can use: ONNX and the model card."""
