"""Metrics to other tools: TensorBoard, Weights & Biases, MLflow, and energy from the GPU."""
