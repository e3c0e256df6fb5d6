"""From a model folder to files for others: ONNX, int8, model card, Hub."""
