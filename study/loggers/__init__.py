"""Optional loggers: TensorBoard, MLflow, Weights & Biases."""
