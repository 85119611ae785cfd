"""Encoders in the forms that other libraries load: torchvision, timm, transformers, ONNX."""
