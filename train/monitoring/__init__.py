"""What is seen of a run while it trains: TensorBoard, figures, the progress bar, samples."""
