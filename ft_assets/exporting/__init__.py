"""Export of released classifiers as ONNX."""
